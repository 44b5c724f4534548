"""`VLLMSampler`: opponents played by one vLLM server or several. Knows nothing of HTTP."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from ..sampler import Completion, CompletionRequest, OpponentSampler, SamplerError, SamplingParams
from .background import Background, all_of
from .errors import UnreachableError, all_gone, lost_too_often
from .http_api import VLLMServer
from .replica import AdapterReplica, OpponentLostError, Opponents, Replica, WeightsReplica
from .work import Work


T = TypeVar("T")

logger = logging.getLogger(__name__)

_MAX_NUM_LOSSES = 3  # in a row, without one completion in between
# How long one of several servers is asked again before its prompts go to the others, in times of its first delay.
_PATIENCE_AMONG_SEVERAL = 10
_NUM_WAITING_PER_SLOT = 4  # completions that wait for the consumer, or to be confirmed


class VLLMSampler(OpponentSampler):
    """
    An [`OpponentSampler`] that asks stock vLLM servers.

    A LoRA opponent is an adapter with a name of its own per run and iteration; earlier ones stay loaded beside it where
    requests are for them. A full opponent replaces a server's weights. The servers pull prompts from one queue, so a
    slow one gets fewer. One that fails, or has lost the opponent because it was restarted, gives its prompts back; it
    is asked again later, and gets the opponent before it plays.

    Args:
        model (`str`): The base model, as the trainer names it.
        lora_rank (`int`, *optional*): Rank of the adapters to come; `None` for full weights.
        served_model (`str`, *optional*): The base model, as the servers name it, where that differs.
        vocab_size (`int`, *optional*): Number of the model's token ids, where it is known: no others are accepted.
        max_concurrent_requests (`int`): Number of completions in flight at each server.
    """

    def __init__(
        self,
        model: str,
        lora_rank: int | None,
        served_model: str | None = None,
        vocab_size: int | None = None,
        max_concurrent_requests: int = 256,
    ):
        self.model = model
        self.lora_rank = lora_rank
        self.served_model = served_model
        self.vocab_size = vocab_size
        self.max_concurrent_requests = max_concurrent_requests
        self.plays_several = lora_rank is not None  # weights replace each other
        self.replicas: list[Replica] = []
        self._opponents: Opponents = {}
        self._has_published = False
        self._background: Background | None = None

    def connect(self, servers: list[VLLMServer], run_name: str, min_context_length: int) -> None:
        """
        Wait for the servers, and see that each can play this run, and that it makes no difference which one answers.

        Args:
            servers (`list[VLLMServer]`): The servers. `close` closes the connections to them.
            run_name (`str`): Distinguishes the opponents of this run from those of others on the same server.
            min_context_length (`int`): Tokens that must at least fit: the shortest prompt and one more.

        Raises:
            `SamplerError`: as [`Replica.connect`] of the first that cannot, or if their contexts differ.
        """
        names = run_name, self.model, self.served_model, self.vocab_size
        if self.lora_rank is None:
            self.replicas = [WeightsReplica(server, *names) for server in servers]
        else:
            self.replicas = [AdapterReplica(server, *names, lora_rank=self.lora_rank) for server in servers]
        self._background = Background()
        self._background.run(all_of(replica.connect(min_context_length) for replica in self.replicas))
        lengths = {replica.address: replica.context_length for replica in self.replicas}
        if len(set(lengths.values())) > 1:
            raise SamplerError(
                f"The vLLM servers have contexts of different lengths: {lengths}. An answer must not depend on which "
                "of them gives it: start all with the same `--max-model-len`."
            )
        if len(servers) > 1:
            for server in servers:
                server.patience = min(_PATIENCE_AMONG_SEVERAL * server.delay, server.server_timeout)

    @property
    def context_length(self) -> int:
        """Number of tokens, prompt and completion, that each server can hold."""
        return self.replicas[0].context_length

    def publish(
        self, iteration: int, checkpoint: Path | None, earlier: Mapping[int, Path | None] | None = None
    ) -> None:
        """Publish to all servers. Those that are not there get it before they play; one at least has to be."""
        self._has_published = True
        opponents = {**(earlier or {}), iteration: checkpoint}
        self._background.run(self._where_reachable(lambda replica: replica.ensure(opponents)))

    def select(self, iteration: int, checkpoint: Path | None, earlier: Mapping[int, Path | None] | None = None) -> None:
        self._opponents = {**(earlier or {}), iteration: checkpoint}

    def sample(
        self, requests: Iterable[CompletionRequest], params: SamplingParams, logprobs: bool = False
    ) -> Iterator[Completion]:
        background = self._background
        work = Work(requests, max_waiting=_NUM_WAITING_PER_SLOT * self.max_concurrent_requests)
        playing = background.start(self._play(work, params, logprobs))
        try:
            while completions := background.run(work.next_completions()):
                yield from completions
        finally:
            background.stop(playing)

    def sample_each(
        self, requests: list[CompletionRequest], params: SamplingParams, logprobs: bool = False
    ) -> dict[str, list[Completion]]:
        """What every server that can be reached answers to the same prompts, by address."""

        async def ask(replica: Replica) -> list[Completion]:
            await replica.ensure(self._opponents)
            answers = [replica.complete(request, self._opponents, params, logprobs) for request in requests]
            completions = await all_of(answers)
            await replica.confirm()
            return completions

        return self._background.run(self._where_reachable(ask))

    def sleep(self, level: int) -> None:
        """Have the one server free its memory. At level 2 it has the opponent no more, and must not say it had."""
        self._background.run(self.replicas[0].sleep(level))

    def wake_up(self) -> None:
        self._background.run(self.replicas[0].server.wake_up())

    def close(self) -> None:
        if self._background is not None:
            self._background.close(all_of(self._leave(replica) for replica in self.replicas))
            self._background = None

    async def _leave(self, replica: Replica) -> None:
        if self._has_published:
            await replica.withdraw()
        await replica.server.close()

    async def _where_reachable(self, act: Callable[[Replica], Awaitable[T]]) -> dict[str, T]:
        """
        Do the same with all servers at once. Returns the results of those that are there, by address.

        Raises:
            `SamplerError`: if none is within `vllm_server_timeout`.
        """
        results: dict[str, T] = {}
        problems: dict[str, str] = {}

        async def act_if_there(replica: Replica) -> None:
            try:
                results[replica.address] = await act(replica)
            except (UnreachableError, OpponentLostError) as error:
                logger.warning(f"The vLLM server at {replica.address} is left out for now: {error}")
                problems[replica.address] = str(error)

        server = self.replicas[0].server
        until = time.monotonic() + server.server_timeout
        while True:
            await all_of(act_if_there(replica) for replica in self.replicas)
            if results:
                return results
            if time.monotonic() >= until:
                raise all_gone(server.server_timeout, problems)
            await asyncio.sleep(server.delay)

    # Playing

    async def _play(self, work: Work, params: SamplingParams, logprobs: bool) -> None:
        """Have all servers play until everything is answered. What goes wrong is for the consumer to raise."""
        try:
            await all_of(self._play_on(replica, work, params, logprobs) for replica in self.replicas)
        except Exception as error:
            await work.fail(error)

    async def _play_on(self, replica: Replica, work: Work, params: SamplingParams, logprobs: bool) -> None:
        num_losses, num_answered = 0, replica.num_answered
        while await work.has_more():
            try:
                await replica.ensure(self._opponents)
                await self._ask(replica, work, params, logprobs)
            except UnreachableError as error:
                self._leave_out(replica, error)
                await asyncio.sleep(replica.server.delay)
            except OpponentLostError as loss:
                num_losses = 1 if replica.num_answered > num_answered else num_losses + 1
                num_answered = replica.num_answered
                if num_losses > _MAX_NUM_LOSSES:
                    raise lost_too_often(replica.address, num_losses, loss) from loss
                logger.warning(
                    f"The vLLM server at {replica.address} has lost the opponent: {loss}. It is published again, and "
                    "what is not answered is asked for again."
                )

    async def _ask(self, replica: Replica, work: Work, params: SamplingParams, logprobs: bool) -> None:
        """Have one server answer until no prompt waits, or it fails: what it has not answered then goes back."""
        taken: dict[tuple[int, int], CompletionRequest] = {}
        unconfirmed: asyncio.Queue[Completion | None] = asyncio.Queue(
            _NUM_WAITING_PER_SLOT * self.max_concurrent_requests
        )

        async def ask() -> None:
            while (request := await work.take()) is not None:
                taken[request.key] = request
                await unconfirmed.put(await replica.complete(request, self._opponents, params, logprobs))

        async def ask_for_all() -> None:
            await all_of(ask() for _ in range(self.max_concurrent_requests))
            await unconfirmed.put(None)

        async def release() -> None:
            is_last = False
            while not is_last:
                completions = [await unconfirmed.get()]
                completions += [unconfirmed.get_nowait() for _ in range(unconfirmed.qsize())]
                if is_last := completions[-1] is None:
                    completions.pop()
                if completions:
                    await replica.confirm()
                for completion in completions:
                    del taken[completion.key]
                    await work.answer(completion)
                replica.has_answered(len(completions))
                await asyncio.sleep(0 if is_last else replica.seconds_between_confirmations)

        try:
            await all_of([ask_for_all(), release()])
        finally:
            await work.give_back(taken.values())

    def _leave_out(self, replica: Replica, error: UnreachableError) -> None:
        """
        Raises:
            `SamplerError`: if no other server is there, nor was for `vllm_server_timeout`.
        """
        if len(self.replicas) == 1:
            raise error
        replica.has_failed(error)
        timeout = replica.server.server_timeout
        if all(other.problem is not None and other.seconds_failing >= timeout for other in self.replicas):
            raise all_gone(timeout, {other.address: other.problem for other in self.replicas})
