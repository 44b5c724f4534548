"""`Work`: prompts that wait for whoever answers them, and completions that wait for the consumer. Knows no servers."""

import asyncio
from collections.abc import Collection, Iterable

from ..sampler import Completion, CompletionRequest


class Work:
    """
    One queue of prompts, for coroutines of one event loop.

    Args:
        requests (iterable of [`CompletionRequest`]): Read one by one, as they are taken.
        max_waiting (`int`): Completions that wait for the consumer, before those who answer wait too.
    """

    def __init__(self, requests: Iterable[CompletionRequest], max_waiting: int):
        self._source = iter(requests)
        self._max_waiting = max_waiting
        self._is_exhausted = False
        self._returned: list[CompletionRequest] = []
        self._num_open = 0  # taken from the source and not answered
        self._completions: list[Completion] = []
        self._error: Exception | None = None
        self._changed = asyncio.Condition()

    async def has_more(self) -> bool:
        """Wait until a prompt waits, or all are answered. Whether one waits."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._is_waiting or self._num_open == 0)
            return self._is_waiting

    async def take(self) -> CompletionRequest | None:
        """The next prompt, or `None` if none waits."""
        async with self._changed:
            if self._returned:
                return self._returned.pop()
            request = None if self._is_exhausted else next(self._source, None)
            if request is not None:
                self._num_open += 1
            elif not self._is_exhausted:
                self._is_exhausted = True
                self._changed.notify_all()
            return request

    async def give_back(self, requests: Collection[CompletionRequest]) -> None:
        """Prompts that somebody else is to answer."""
        async with self._changed:
            self._returned.extend(requests)
            self._changed.notify_all()

    async def answer(self, completion: Completion) -> None:
        """Hand a completion to the consumer, as soon as there is room for it."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._completions) < self._max_waiting)
            self._completions.append(completion)
            self._num_open -= 1
            self._changed.notify_all()

    async def fail(self, error: Exception) -> None:
        """Have the consumer raise it."""
        async with self._changed:
            self._error = error
            self._changed.notify_all()

    async def next_completions(self) -> list[Completion]:
        """Those that are there, as soon as there are some; none when all prompts are answered."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._completions or self._error or self._is_done)
            if self._error is not None:
                raise self._error
            completions, self._completions = self._completions, []
            self._changed.notify_all()
            return completions

    @property
    def _is_waiting(self) -> bool:
        return bool(self._returned) or not self._is_exhausted

    @property
    def _is_done(self) -> bool:
        return self._is_exhausted and self._num_open == 0
