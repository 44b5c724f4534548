"""`Background`: an event loop in a thread of its own, for whoever has none, or has one that is running already."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar


T = TypeVar("T")


class Background:
    """An event loop that runs in a thread until it is closed."""

    def __init__(self):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="spin_trl-sampler", daemon=True)
        self._thread.start()

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        """Have the loop call it soon."""
        self._loop.call_soon_threadsafe(function, *args)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run it and wait for it. If the waiting is interrupted, it is cancelled."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    @contextmanager
    def running(self, coroutine: Coroutine[Any, Any, Any]) -> Iterator[None]:
        """Have it run beside the block, and end with it."""

        async def begin() -> asyncio.Task:
            return asyncio.create_task(coroutine)

        task = self.run(begin())
        try:
            yield
        finally:
            if not task.done():
                self.run(cancel([task]))

    def close(self, last: Coroutine[Any, Any, Any]) -> None:
        """Cancel whatever runs, then run this, and end the thread."""

        async def end() -> None:
            await cancel(asyncio.all_tasks() - {asyncio.current_task()})
            await last

        try:
            self.run(end())
        finally:
            self.call(self._loop.stop)
            self._thread.join()
            self._loop.close()


async def cancel(tasks: Iterable[asyncio.Task]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def all_of(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """As `asyncio.gather`, but the first error ends the others."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await cancel(tasks)
