"""`ReplicatedSampler`: an opponent played by several vLLM servers at once. Knows nothing of HTTP."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..sampler import Completion, CompletionRequest, SamplerError, SamplingParams
from .attempts import Progress
from .errors import UnreachableError
from .http_api import VLLMServer
from .sampler import VLLMSampler


logger = logging.getLogger(__name__)

# Seconds for which a replica that does not answer is asked again before its prompts go to the others.
_PATIENCE = 5.0
_SECONDS_BETWEEN_LOOKS = 1.0
_MOST_WAITING = 1024  # completions that wait for whoever writes them, before the replicas wait too


class ReplicatedSampler:
    """
    An [`OpponentSampler`] that shares the prompts among several servers, each asked by a [`VLLMSampler`] of its own.

    A replica takes the next prompt whenever it has room, so a slow one gets fewer. One that does not answer is left
    out and its prompts go to the others; it is asked again when it is healthy, and what was published meanwhile is
    published to it first: that is how each [`VLLMSampler`] treats a server that lost the opponent.

    Args:
        replicas (`list[VLLMSampler]`): One for each server.
    """

    reads_checkpoints = True

    def __init__(self, replicas: list[VLLMSampler]):
        self.replicas = replicas
        self._work: _SharedWork | None = None
        self._players: list[_Player] = []

    def connect(self, servers: list[VLLMServer], run_name: str, min_context_length: int) -> None:
        """
        Wait for all servers, and see that each can play this run, and that it makes no difference which one answers.

        Raises:
            `SamplerError`: as [`VLLMSampler.connect`] of the first that cannot, or if their contexts differ.
        """
        connect = dict(zip(self.replicas, servers, strict=True))
        _at_once(self.replicas, lambda replica: replica.connect(connect[replica], run_name, min_context_length))
        lengths = {replica.base_url: replica.context_length for replica in self.replicas}
        if len(set(lengths.values())) > 1:
            raise SamplerError(
                f"The vLLM servers have contexts of different lengths: {_listed(lengths)}. An answer must not depend "
                "on which of them gives it: start all with the same `--max-model-len`."
            )
        for replica in self.replicas:
            replica.require_noticing_restarts()
            replica.server.patience = min(_PATIENCE, replica.server.server_timeout)

    @property
    def context_length(self) -> int:
        """Number of tokens, prompt and completion, that each server can hold."""
        return self.replicas[0].context_length

    @property
    def plays_several(self) -> bool:
        return self.replicas[0].plays_several

    def publish(
        self, iteration: int, checkpoint: Path | None, earlier: Mapping[int, Path | None] | None = None
    ) -> None:
        """Publish to all; those that are not there get the opponent when they are back. One at least has to be."""
        timeout = self.replicas[0].server.server_timeout
        until = time.monotonic() + timeout
        while True:
            problems = _at_once_where_reachable(
                self.replicas, lambda replica: replica.publish(iteration, checkpoint, earlier)
            )
            if len(problems) < len(self.replicas):
                return
            if time.monotonic() > until:
                raise _all_gone(timeout, problems)
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def select(self, iteration: int, checkpoint: Path | None, earlier: Mapping[int, Path | None] | None = None) -> None:
        for replica in self.replicas:
            replica.select(iteration, checkpoint, earlier)

    def sample_each(
        self, requests: list[CompletionRequest], params: SamplingParams, logprobs: bool = False
    ) -> dict[str, list[Completion]]:
        """What every replica that can be reached answers to the same prompts, by address."""
        found: dict[str, list[Completion]] = {}

        def sample(replica: VLLMSampler) -> None:
            found.update(replica.sample_each(requests, params, logprobs))

        problems = _at_once_where_reachable(self.replicas, sample)
        if not found:
            raise _all_gone(self.replicas[0].server.patience, problems)
        return found

    def sample(
        self, requests: Iterable[CompletionRequest], params: SamplingParams, logprobs: bool = False
    ) -> Iterator[Completion]:
        self._stop()
        self._work = work = _SharedWork(requests)
        self._players = players = [_Player(replica, work, params, logprobs) for replica in self.replicas]
        for player in players:
            player.start()
        try:
            yield from self._collect(work, players)
        finally:
            if work is self._work:
                self._stop()

    def close(self) -> None:
        self._stop()
        for replica in self.replicas:
            replica.close()

    def _collect(self, work: "_SharedWork", players: list["_Player"]) -> Iterator[Completion]:
        server = self.replicas[0].server
        progress = Progress(server.progress_timeout)
        while not work.is_done:
            try:
                result = work.next_result(timeout=min(_SECONDS_BETWEEN_LOOKS, progress.left()))
            except queue.Empty:
                if all(player.has_failed_for(server.server_timeout) for player in players):
                    raise _all_gone(
                        server.server_timeout, {player.base_url: player.problem for player in players}
                    ) from None
                if progress.left() == 0:
                    raise self._no_progress(progress, players) from None
                continue
            if isinstance(result, BaseException):
                raise result
            if result is not None:
                yield result
                progress.made()

    def _no_progress(self, progress: Progress, players: list["_Player"]) -> SamplerError:
        states = {player.base_url: player.problem or "no answer yet" for player in players}
        return SamplerError(
            f"Not one completion came back from any of the {len(players)} vLLM servers within "
            f"`vllm_progress_timeout` ({progress.timeout:g} s). {_listed(states)}. See their logs and restart them; if "
            "they are only slow, raise `vllm_progress_timeout` or lower `vllm_max_concurrent_requests`."
        )

    def _stop(self) -> None:
        """End what is going on, and wait until it has ended."""
        if self._work is None:
            return
        self._work.stop()
        for player in self._players:
            player.server.interrupt()
        for player in self._players:
            player.join()
            player.server.allow()
        self._work, self._players = None, []


class _SharedWork:
    """Prompts that wait for a replica, and answers that wait for the consumer. For several threads."""

    def __init__(self, requests: Iterable[CompletionRequest]):
        self.results: queue.SimpleQueue[Completion | BaseException | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(_MOST_WAITING)
        self._source = iter(requests)
        self._returned: list[CompletionRequest] = []
        self._num_unanswered = 0  # taken from the source
        self._is_exhausted = False
        self._is_stopped = False
        self._changed = threading.Condition()

    @property
    def is_done(self) -> bool:
        """Whether everything is answered, and the consumer has all answers."""
        with self._changed:
            return self._is_exhausted and self._num_unanswered == 0 and self.results.empty()

    @property
    def is_stopped(self) -> bool:
        return self._is_stopped

    def take(self) -> CompletionRequest | None:
        """The next prompt, or `None` if none waits."""
        with self._changed:
            if self._is_stopped:
                return None
            if self._returned:
                return self._returned.pop()
            if self._is_exhausted:
                return None
            request = next(self._source, None)
            if request is None:
                self._is_exhausted = True
                self.results.put(None)  # that may be all: the consumer looks
                self._changed.notify_all()
            else:
                self._num_unanswered += 1
            return request

    def give_back(self, requests: Iterable[CompletionRequest]) -> None:
        """Prompts that another replica is to answer."""
        with self._changed:
            self._returned.extend(requests)
            self._changed.notify_all()

    def next_result(self, timeout: float) -> Completion | BaseException | None:
        """
        Raises:
            `queue.Empty`: if none came in so many seconds.
        """
        result = self.results.get(timeout=timeout)
        if isinstance(result, Completion):
            self._room.release()
        return result

    def answer(self, completion: Completion) -> None:
        """Hand a completion to the consumer, as soon as there is room for it."""
        while not self._room.acquire(timeout=_SECONDS_BETWEEN_LOOKS):
            if self._is_stopped:
                return
        with self._changed:
            self.results.put(completion)
            self._num_unanswered -= 1
            self._changed.notify_all()

    def wait_for_more(self) -> bool:
        """Wait until a prompt waits, or all are answered. Whether there is one."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopped or self._has_waiting or self._num_unanswered == 0)
            return self._has_waiting and not self._is_stopped

    def pause(self, seconds: float) -> None:
        """Sleep, but not beyond the end of the work."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopped, timeout=seconds)

    def stop(self) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    @property
    def _has_waiting(self) -> bool:
        return bool(self._returned) or not self._is_exhausted


class _Player(threading.Thread):
    """Has one replica play, as long as there are prompts."""

    def __init__(self, replica: VLLMSampler, work: _SharedWork, params: SamplingParams, logprobs: bool):
        super().__init__(name=f"spin_trl-{replica.base_url}", daemon=True)
        self.base_url = replica.base_url
        self.server = replica.server
        self.problem: str | None = None
        self._is_asked = True
        self._failing_since = 0.0
        self._replica = replica
        self._work = work
        self._params = params
        self._logprobs = logprobs
        self._mine: dict[tuple[int, int], CompletionRequest] = {}

    def has_failed_for(self, seconds: float) -> bool:
        """Whether nothing has come from the replica for so long since it failed, and it is not being asked again."""
        return self.problem is not None and not self._is_asked and time.monotonic() > self._failing_since + seconds

    def run(self) -> None:
        try:
            while self._work.wait_for_more():
                try:
                    self._play()
                except UnreachableError as error:
                    self._leave_out(error)
        except BaseException as error:  # handed to the consumer, who raises it
            if not self._work.is_stopped:
                self._work.results.put(error)

    def _play(self) -> None:
        if self.problem is not None:
            self.server.wait_until_ready()
        self._is_asked = True
        for completion in self._replica.sample(self._take(), self._params, self._logprobs):
            if self.problem is not None:
                logger.warning(f"The vLLM server at {self.base_url} is back.")
                self.problem = None
            del self._mine[completion.key]
            self._work.answer(completion)

    def _take(self) -> Iterator[CompletionRequest]:
        while (request := self._work.take()) is not None:
            self._mine[request.key] = request
            yield request

    def _leave_out(self, error: UnreachableError) -> None:
        if self.problem is None:
            self._failing_since = time.monotonic()
            logger.warning(
                f"The vLLM server at {self.base_url} is left out until it is back; {len(self._mine)} prompt(s) go to "
                f"the others. {error}"
            )
        self.problem = str(error)
        self._is_asked = False
        self._work.give_back(self._mine.values())
        self._mine.clear()
        self._work.pause(_SECONDS_BETWEEN_LOOKS)


def _at_once(replicas: list[VLLMSampler], act: Callable[[VLLMSampler], Any]) -> None:
    """Do the same with all, each in a thread of its own. Raises what goes wrong, also if it is several errors."""
    errors: list[BaseException] = []

    def run(replica: VLLMSampler) -> None:
        try:
            act(replica)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(replica,), daemon=True) for replica in replicas]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(errors) > 1 and all(isinstance(error, SamplerError) for error in errors):
        raise SamplerError("\n".join(map(str, errors)))
    if errors:
        raise errors[0]


def _at_once_where_reachable(replicas: list[VLLMSampler], act: Callable[[VLLMSampler], Any]) -> dict[str, str]:
    """As [`_at_once`], but a server that cannot be reached is no error. Returns what they failed of, by address."""
    problems: dict[str, str] = {}

    def act_if_there(replica: VLLMSampler) -> None:
        try:
            act(replica)
        except UnreachableError as error:
            logger.warning(f"Left out for now: {error}")
            problems[replica.base_url] = str(error)

    _at_once(replicas, act_if_there)
    return problems


def _all_gone(seconds: float, problems: dict[str, str | None]) -> SamplerError:
    return SamplerError(
        f"None of the {len(problems)} vLLM servers was there within `vllm_server_timeout` ({seconds:g} s). "
        f"{_listed(problems)}"
    )


def _listed(by_address: dict[str, Any]) -> str:
    return "; ".join(f"{address}: {value}" for address, value in by_address.items())
