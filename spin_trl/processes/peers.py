"""`Peers`: the other processes of a run, met and told of failures through the process group's key-value store.

Nothing here waits inside the store or inside a collective, so nothing has a time limit: processes look, and look again.
Knows nothing of what the processes do.
"""

import base64
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.distributed import DistError, PrefixStore, Store


_LONGEST_POLL_INTERVAL = 0.25  # seconds
_LOOK_INTERVAL = 1.0  # seconds
_PATIENCE_WITH_PEERS = 5.0  # seconds for the others to take note of what this process tells them before it ends
_MAX_SENT_CHARACTERS = 1_000_000  # the store refuses values above 8 MiB


class LostPeersError(ConnectionError):
    """The store does not answer any more, so whoever held it is gone."""


@dataclass(frozen=True)
class Failure:
    """
    An error of one process, as the others are told of it.

    Args:
        process_index (`int`): The process.
        summary (`str`): Type and message.
        traceback (`str`): The whole traceback.
        pickled (`bytes`, *optional*): The error itself, if it can go to another process.
    """

    process_index: int
    summary: str
    traceback: str
    pickled: bytes | None

    @classmethod
    def of(cls, error: BaseException, process_index: int) -> "Failure":
        lines = traceback.format_exception(error)
        pickled = _pickled(error)
        return cls(process_index, f"{type(error).__name__}: {error}"[:1000], _shortened("".join(lines)), pickled)

    def to_text(self) -> str:
        return base64.b85encode(pickle.dumps(self)).decode()

    @classmethod
    def from_text(cls, text: bytes) -> "Failure":
        return pickle.loads(base64.b85decode(text))

    def error(self) -> BaseException:
        """The error, or one that says the same, with where it came from."""
        try:
            error = pickle.loads(self.pickled) if self.pickled is not None else RuntimeError(self.summary)
        except Exception:  # a class that only the failed process knows
            error = RuntimeError(self.summary)
        error.add_note(f"On process {self.process_index}:\n{self.traceback}")
        return error


class Peers:
    """
    All processes of a run, as one of them sees them.

    Failures belong to an era, which ends for a process when it raises one. So an error that every process has raised
    is over with, and the next call starts clean. The store holds a few keys per era, and those of the last two eras.

    Args:
        store (`torch.distributed.Store`): The process group's.
        index (`int`): Number of this process.
        count (`int`): Number of processes.
        prefix (`str`): What all keys in the store begin with.
    """

    def __init__(self, store: Store, index: int, count: int, prefix: str = "spin_trl"):
        self.index = index
        self.count = count
        self.era = 0
        # Connections of its own for this thread and for a watcher's, made while the store is sure to answer: a call of
        # another thread that hangs does not hold them.
        self._thread = threading.get_ident()
        self._connection, self._watchers_connection = (PrefixStore(prefix, store.clone()) for _ in range(2))
        self._num_meetings = self._num_departures = 0
        self._noted_era = -1
        self._note_lock = threading.Lock()
        self._next_look = 0.0

    def meet(self) -> None:
        """
        Return when all processes have called this as often as this one.

        Raises:
            Another process's error, as soon as it is known. [`LostPeersError`]: if the store is gone.
        """
        self._num_meetings += 1
        self._ask("add", "arrived", 1)
        self._await("arrived", self._num_meetings)
        if self._num_meetings == 1 and self.era > 0 and self.index == 0:
            for name in ("arrived", "left", "known", "failure"):  # everybody has come out of that era
                self._ask("delete_key", name, era=self.era - 1)

    def leave(self) -> None:
        """To be called after the last meeting. The process that may hold the store stays until all are through."""
        self._num_departures += 1
        try:
            self._ask("add", "left", 1)
            if self.index == 0:
                self._await("left", self._num_departures, seconds=_PATIENCE_WITH_PEERS)
        except LostPeersError:
            pass  # all have met, so the work is done

    def failure(self, era: int) -> Failure | None:
        """The failure of an era, if there is one."""
        if not self._ask("check", ["failure"], era=era):
            return None
        # Not `get`, which would wait if all processes were through with the era just now. This sets nothing.
        text = self._ask("compare_set", "failure", "", "", era=era)
        return Failure.from_text(text) if text else None

    def raise_failure(self) -> None:
        """Raise another process's error, if there is one."""
        failure = self.failure(self.era)
        if failure is None:
            return
        self.take_note(self.era, failure)
        error = failure.error()
        self._end_era(error)
        raise error

    def look(self) -> None:
        """As [`raise_failure`], but at most about once a second, however often it is called."""
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _LOOK_INTERVAL
            self.raise_failure()

    @contextmanager
    def sharing_errors(self) -> Iterator[None]:
        """
        An error that leaves this context is told to all processes at once, and ends the era. The first that is told of
        wins: every process raises that one.
        """
        first_era = self.era
        try:
            yield
        except BaseException as error:
            shared = error if _is_shared(error, first_era) else self._share(error)
            if shared is error:
                raise
            raise shared from error

    def announce(self, error: BaseException, era: int) -> Failure:
        """Tell the others of an error. Returns what they are told: this error, unless there was another before it."""
        told = Failure.of(error, self.index).to_text()
        return Failure.from_text(self._ask("compare_set", "failure", "", told, era=era))

    def take_note(self, era: int, failure: Failure, text: str | None = None) -> None:
        """Once in an era: let the others know that this process knows of the failure, and say so."""
        with self._note_lock:
            if era <= self._noted_era:
                return
            self._noted_era = era
        if failure.process_index != self.index:
            say(
                text
                or f"Process {failure.process_index} has failed, so process {self.index} stops too: {failure.summary}"
            )
        self._ask("add", "known", 1, era=era)

    # Inside

    def _share(self, error: BaseException) -> BaseException:
        """Returns what this process is to raise."""
        era = self.era
        try:
            failure = self.announce(error, era)
            self.take_note(era, failure)
            is_own = failure.process_index == self.index
            if (is_own and failure.pickled is None) or (not is_own and isinstance(error, Exception)):
                error = failure.error()
            else:
                error.add_note(f"On process {self.index}")
            self._end_era(error)
            if is_own:
                self._await("known", 1, seconds=_PATIENCE_WITH_PEERS, era=era)
        except LostPeersError:
            pass  # nobody is left to be told
        return error

    def _end_era(self, error: BaseException) -> None:
        error._spin_trl_era = self.era
        self.era += 1
        self._num_meetings = self._num_departures = 0

    def _await(self, name: str, times: int, seconds: float | None = None, era: int | None = None) -> None:
        """Poll until a counter has reached `times` for every process, or until so many seconds are over."""
        interval, started = 0.001, time.monotonic()

        def is_short() -> bool:
            return self._ask("add", name, 0, era=era) < times * self.count

        while is_short():
            if seconds is None:
                # One that failed after it had come here failed in a later call, and is not to be raised in this one.
                if self.failure(self.era) is not None and is_short():
                    self.raise_failure()
            elif time.monotonic() > started + seconds:
                return
            time.sleep(interval)
            interval = min(2 * interval, _LONGEST_POLL_INTERVAL)

    def _ask(self, method: str, key: Any, *args: Any, era: int | None = None) -> Any:
        prefix = f"{self.era if era is None else era}/"
        key = [prefix + name for name in key] if isinstance(key, list) else prefix + key
        store = self._connection if threading.get_ident() == self._thread else self._watchers_connection
        try:
            return getattr(store, method)(key, *args)
        except DistError as error:
            raise LostPeersError(
                "The process group's key-value store does not answer any more: process 0, or the launcher, is gone. "
                "The end of its output may say why."
            ) from error


def say(text: str) -> None:
    """Print to where errors go, at once: the process may end right after."""
    print(text, file=sys.stderr, flush=True)


def _is_shared(error: BaseException | None, first_era: int) -> bool:
    """Whether an error, or one that it was raised because of, has been shared in this era or later."""
    while error is not None and getattr(error, "_spin_trl_era", -1) < first_era:
        error = error.__cause__ or error.__context__
    return error is not None


def _pickled(error: BaseException) -> bytes | None:
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
    except Exception:  # whatever an exception class of somebody else's does when pickled
        return None
    return pickled if len(pickled) <= _MAX_SENT_CHARACTERS else None


def _shortened(text: str) -> str:
    """The end of it, which is what names the error."""
    return text[-_MAX_SENT_CHARACTERS:]
