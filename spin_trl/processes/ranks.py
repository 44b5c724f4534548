"""Work that one or all processes do, such that an error of any of them ends it on every one, instead of a hang.

While a process waits for others it looks whether one of them has failed; it waits inside no collective, so that work of
many hours runs into no time limit of the process group.
"""

import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.distributed import distributed_c10d

from .peers import LostPeersError, Peers, say


T = TypeVar("T")

GRACE_PERIOD = 15.0  # seconds that a process has to notice by itself that another has failed
_WATCH_INTERVAL = 1.0  # seconds


def on_main_process(function: Callable[[], T]) -> T:
    """
    Run `function` on the main process and return its result, which must be picklable, on all.

    Raises:
        Whatever `function` raises, on every process.
    """
    peers = _peers()
    if peers is None:
        return function()
    result, pickled = None, None
    with peers.sharing_errors():
        if PartialState().is_main_process:
            result = function()
            pickled = pickle.dumps(result)
        peers.meet()
        outcome = [pickled]
        broadcast_object_list(outcome)
        return result if PartialState().is_main_process else pickle.loads(outcome[0])


def on_every_process(function: Callable[[], T]) -> T:
    """
    Run `function` on every process and wait for all of them.

    Raises:
        The error of the process that fails first, on every process.
    """
    peers = _peers()
    if peers is None:
        return function()
    with peers.sharing_errors():
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
    results = [on_every_process(function if number == turn else _do_nothing) for number in range(3)]
    return results[turn]


def raise_if_another_failed() -> None:
    """To be called often in long work that does not wait for others: raises the error of a process that has failed."""
    if _known_peers is not None and distributed_c10d.is_initialized():
        _known_peers.look()


@contextmanager
def failing_together() -> Iterator[None]:
    """
    A context, or decorator, around work of all processes, of which nobody knows where it may wait for others.

    An error that leaves it on one process is raised on every other, if that one looks: in a call of this module, or at
    the end of the context, where all meet. A process that has not looked for `GRACE_PERIOD` seconds, because it waits
    in a collective for the one that has failed, is ended with that one's error on its standard error. A process may
    take as long as it likes.

    A process that is killed tells nobody. What started it (torchrun, accelerate launch) ends the others; without that,
    they end if it was process 0, which then holds the store.
    """
    peers = _peers()
    if peers is None:
        yield
        return
    watcher = _Watcher(peers)
    watcher.start()
    try:
        with peers.sharing_errors():
            yield
            peers.meet()
    finally:
        watcher.stop()
    peers.leave()


class _Watcher(threading.Thread):
    """Ends this process if another one has failed and the main thread does not notice."""

    def __init__(self, peers: Peers):
        super().__init__(name="spin_trl-watcher", daemon=True)
        self.peers = peers
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()
        self.join(timeout=2 * _WATCH_INTERVAL)

    def run(self) -> None:
        while not self._stopped.wait(_WATCH_INTERVAL):
            era = self.peers.era
            try:
                failure = self.peers.failure(era)
                if failure is None or failure.process_index == self.peers.index or self._notices(era, _WATCH_INTERVAL):
                    continue
                text = f"Process {failure.process_index} has failed:\n{failure.traceback}"
                self.peers.take_note(era, failure, text)
                if not self._notices(era, GRACE_PERIOD):
                    self.peers.announce(RuntimeError(f"Process {self.peers.index} had to be ended."), era + 1)
                    self._end_process(f"process {failure.process_index} has failed, see above")
            except LostPeersError as error:
                if not self._notices(era, GRACE_PERIOD):
                    self._end_process(str(error))

    def _notices(self, era: int, seconds: float) -> bool:
        """Whether the main thread raises the failure, or gets out of the context, within so many seconds."""
        deadline = time.monotonic() + seconds
        while not self._stopped.is_set() and self.peers.era == era:
            if time.monotonic() > deadline:
                return False
            self._stopped.wait(0.1)
        return True

    def _end_process(self, reason: str) -> None:
        say(f"Process {self.peers.index} waits for what will not come, so it is ended: {reason}")
        sys.stdout.flush()
        os._exit(1)


_known_peers: Peers | None = None
_store: Any = None
_num_groups = 0


def _peers() -> Peers | None:
    """The processes of the process group; `None` if this one is alone."""
    global _known_peers, _store, _num_groups
    state = PartialState()
    if state.num_processes == 1:
        return None
    store = distributed_c10d._get_default_store()
    if store is not _store:  # a new process group
        _num_groups += 1
        _store, _known_peers = store, Peers(store, state.process_index, state.num_processes, f"spin_trl/{_num_groups}")
    return _known_peers


def _do_nothing() -> None:
    pass
