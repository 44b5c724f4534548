"""Work of one or all processes, such that an error of any of them is raised on every one, instead of a hang.

Processes tell each other through the process group's key-value store how far they are and who has failed, and wait by
looking there again and again. So work of many hours runs into no time limit, and signals are heard while waiting.

A process that fails says so and raises its error. The others raise the same error when they next look: at the end of a
piece of work, or in [`raise_if_another_failed`]. What ends a process that cannot look, because it waits in a collective
for one that has ended, is the launcher (torchrun, accelerate launch), within 30 seconds.
"""

import math
import pickle
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import TypeVar
from weakref import WeakKeyDictionary

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import distributed


T = TypeVar("T")

_LONGEST_PAUSE = 0.25  # seconds between two looks of a process that waits
_SECONDS_BETWEEN_LOOKS = 1.0  # of one that works
_PATIENCE = 5.0  # seconds for the others to hear of a failure before the launcher sees this process end
_MAX_SENT = 1_000_000  # bytes; the store refuses values above 8 MiB


def on_main_process(function: Callable[[], T]) -> T:
    """
    Run `function` on the main process and return its result, which must be picklable, on all.

    Raises:
        Whatever `function` raises, on every process.
    """
    if _peers() is None:
        return function()
    is_main = PartialState().is_main_process

    def work() -> tuple[T | None, bytes]:
        result = function() if is_main else None
        return result, pickle.dumps(result)  # here, so that what cannot be pickled is an error of all

    result, pickled = on_every_process(work)
    sent = [pickled]
    broadcast_object_list(sent)
    return result if is_main else pickle.loads(sent[0])


def on_every_process(function: Callable[[], T]) -> T:
    """
    Run `function` on every process and wait for all of them.

    Raises:
        A process's own error where it has one, otherwise the error of the first that failed. An error that cannot be
        pickled is a `RuntimeError` on the others.
    """
    peers = _peers()
    if peers is None:
        return function()
    with failing_together():
        result = function()
        peers.meet()
        return result


def main_process_first(function: Callable[[], T]) -> T:
    """
    Run `function` on every process: on the main one first, then on the first of each machine, and then on the others,
    which find in a cache on disk what was made before.

    Raises:
        As [`on_every_process`].
    """
    if _peers() is None:
        return function()
    turn = 0 if PartialState().is_main_process else 1 if PartialState().is_local_main_process else 2
    results = [on_every_process(function if number == turn else lambda: None) for number in range(3)]
    return results[turn]


def raise_if_another_failed() -> None:
    """To be called often in long work that does not wait for others: raises the error of a process that has failed."""
    peers = _peers()
    if peers is not None and time.monotonic() >= peers.next_look:
        peers.next_look = time.monotonic() + _SECONDS_BETWEEN_LOOKS
        if peers.has_failed():
            peers.raise_failure()


@contextmanager
def failing_together() -> Iterator[None]:
    """A context, or decorator: an error that leaves it on one process is raised on every other one that looks."""
    peers = _peers()
    if peers is None:
        yield
        return
    era = peers.era
    try:
        yield
    except BaseException as error:
        if peers.era == era:  # else all know of it
            peers.tell(error)
        raise


class _Peers:
    """
    The processes of a group, as one of them sees them.

    A failure ends an era, for each process when it raises. So an error that every process has raised and caught is over
    with, and the next call begins clean. The store holds three keys for an era.
    """

    def __init__(self, group: distributed.ProcessGroup, number: int):
        self.store = distributed.PrefixStore(f"spin_trl/{number}", group.get_group_store())
        self.count = group.size()
        self.era = self.num_meetings = 0
        self.next_look = 0.0

    def meet(self) -> None:
        """Return when all processes have called this as often as this one, or raise the error of one that failed."""
        self.num_meetings += 1
        self.store.add(f"{self.era}/arrived", 1)
        for _ in _looks():
            has_failed = self.has_failed()  # looked up first: one that fails after it was here fails in a later call
            if self.store.add(f"{self.era}/arrived", 0) >= self.num_meetings * self.count:
                break
            if has_failed:
                self.raise_failure()
        PartialState().wait_for_everyone()  # soon: the process that may hold the store stays until all have seen it

    def has_failed(self) -> bool:
        return self.store.check([f"{self.era}/failure"])

    def raise_failure(self) -> None:
        error = _unpacked(self.store.get(f"{self.era}/failure"))
        self._begin_era()
        raise error

    def tell(self, error: BaseException) -> None:
        """The first that fails is heard."""
        era = self.era
        with suppress(distributed.DistError):  # the store is gone, and so are all others
            self.store.compare_set(f"{era}/failure", "", _packed(error))
            self._begin_era()
            for _ in _looks(_PATIENCE):
                if self.store.add(f"{era}/ended", 0) == self.count:
                    break

    def _begin_era(self) -> None:
        self.store.add(f"{self.era}/ended", 1)
        self.era += 1
        self.num_meetings = 0


def _looks(seconds: float = math.inf) -> Iterator[None]:
    """When to look: at once, and again and again until so many seconds are over."""
    end, pause = time.monotonic() + seconds, 0.001
    while time.monotonic() < end:
        yield
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


# More than one where a process group was ended and begun again. Weak: what keeps a group keeps its threads, and gloo's
# abort a process that ends while they run.
_known: WeakKeyDictionary[distributed.ProcessGroup, _Peers] = WeakKeyDictionary()
_numbers = count()


def _peers() -> _Peers | None:
    """The processes of the process group; `None` if this one is alone."""
    if PartialState().num_processes == 1:
        return None
    group = distributed.group.WORLD
    if group not in _known:
        _known[group] = _Peers(group, next(_numbers))
    return _known[group]


def _packed(error: BaseException) -> bytes:
    lines = "".join(traceback.format_exception(error))
    summary = f"Process {PartialState().process_index} failed with {type(error).__name__}: {error}"
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
    except Exception:  # whatever an exception class of somebody else's does when pickled
        pickled = b""
    return pickle.dumps((pickled[:_MAX_SENT], summary[:1000], lines[-_MAX_SENT:]))


def _unpacked(sent: bytes) -> BaseException:
    pickled, summary, lines = pickle.loads(sent)
    try:
        error = pickle.loads(pickled)
    except Exception:  # it could not be pickled, or only the other process knows its class
        error = RuntimeError(summary)
    error.add_note(f"{summary}\n{lines}")
    return error
