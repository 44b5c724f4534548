"""`VLLMSampler`: opponents played by one vLLM server or several. Knows nothing of HTTP."""

import asyncio
import logging
import queue
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..sampler import Completion, CompletionRequest, OpponentSampler, SamplerError, SamplingParams
from .background import Background, all_of
from .http_api import UnreachableError, VLLMServer
from .replica import AdapterReplica, OpponentLostError, Opponents, Replica, WeightsReplica


T = TypeVar("T")

logger = logging.getLogger(__name__)

_MAX_NUM_LOSSES = 5  # in a row, without one completion in between
# How long one of several servers is asked again before its prompts go to the others, in times of its first delay.
_PATIENCE_AMONG_SEVERAL = 10
_NUM_PROMPTS_PER_SLOT = 5  # that are read, and whose answers the consumer has not taken yet


@dataclass
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

    model: str
    lora_rank: int | None
    served_model: str | None = None
    vocab_size: int | None = None
    max_concurrent_requests: int = 256

    def __post_init__(self):
        self.plays_several = self.lora_rank is not None  # weights replace each other
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
        kind = WeightsReplica if self.lora_rank is None else AdapterReplica
        options = run_name, self.model, self.served_model, self.vocab_size, self.lora_rank
        self.replicas = [kind(server, *options) for server in servers]
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
        prompts, answers = asyncio.Queue(), queue.SimpleQueue()

        def take() -> Completion:
            answer = answers.get()
            if isinstance(answer, BaseException):
                raise answer
            return answer

        room = _NUM_PROMPTS_PER_SLOT * self.max_concurrent_requests * len(self.replicas)
        num_open = 0
        with self._background.running(self._play(prompts, answers.put, params, logprobs)):
            for request in requests:
                if num_open == room:
                    yield take()
                    num_open -= 1
                self._background.call(prompts.put_nowait, request)
                num_open += 1
            for _ in range(num_open):
                yield take()

    def sample_each(
        self, requests: list[CompletionRequest], params: SamplingParams, logprobs: bool = False
    ) -> dict[str, list[Completion]]:
        """What every server that can be reached answers to the same prompts, by address."""

        async def ask(replica: Replica) -> list[Completion]:
            await replica.ensure(self._opponents)
            return await all_of(replica.complete(one, self._opponents, params, logprobs) for one in requests)

        return self._background.run(self._where_reachable(ask))

    def sleep(self, level: int) -> None:
        """Have the one server free its memory, see [`VLLMServer.sleep`]."""
        self._background.run(self.replicas[0].server.sleep(level))

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
        """Do the same with all servers at once. Returns the results of those that are there, by address."""
        results: dict[str, T] = {}

        async def act_if_there(replica: Replica) -> None:
            try:
                results[replica.address] = await act(replica)
            except (UnreachableError, OpponentLostError) as error:
                await self._bear(replica, error)
            else:
                replica.is_well()

        while not results:
            await all_of(act_if_there(replica) for replica in self.replicas)
        return results

    async def _play(
        self,
        prompts: asyncio.Queue[CompletionRequest],
        answer: Callable[[Completion | BaseException], None],
        params: SamplingParams,
        logprobs: bool,
    ) -> None:
        """Have all servers play, until it fails or is cancelled: that is the last answer."""

        async def ask(replica: Replica) -> None:
            while True:
                request = await prompts.get()
                try:
                    answer(await replica.complete(request, self._opponents, params, logprobs))
                    replica.is_well()
                except BaseException:
                    prompts.put_nowait(request)  # for whoever is there
                    raise

        async def play(replica: Replica) -> None:
            while True:
                try:
                    await replica.ensure(self._opponents)
                    await all_of(ask(replica) for _ in range(self.max_concurrent_requests))
                except (UnreachableError, OpponentLostError) as error:
                    await self._bear(replica, error)

        try:
            await all_of(play(replica) for replica in self.replicas)
        except BaseException as error:
            answer(error)

    async def _bear(self, replica: Replica, error: UnreachableError | OpponentLostError) -> None:
        """
        Wait a little before a server is asked again that was not there, or has lost the opponent.

        Raises:
            `SamplerError`: if it loses it again and again, or no server has been there for `vllm_server_timeout`.
        """
        if isinstance(error, OpponentLostError):
            replica.num_losses += 1
            if replica.num_losses > _MAX_NUM_LOSSES:
                raise SamplerError(
                    f"The vLLM server at {replica.address} lost the opponent {replica.num_losses} times in a row "
                    f"without one completion in between. The last time: {error}. See its log for why it is restarted, "
                    "and see that no other run publishes to it."
                ) from error
            logger.warning(
                f"The vLLM server at {replica.address} has lost the opponent: {error}. It is published again, and what "
                "is not answered is asked for again."
            )
        elif len(self.replicas) == 1:
            raise error
        else:
            replica.is_gone(error)
            timeout = replica.server.server_timeout
            if max(other.gone_since for other in self.replicas) <= time.monotonic() - timeout:
                listed = "; ".join(f"{other.address}: {other.problem}" for other in self.replicas)
                raise SamplerError(
                    f"No vLLM server was there within `vllm_server_timeout` ({timeout:g} s). {listed}"
                ) from error
        await asyncio.sleep(replica.server.delay)
