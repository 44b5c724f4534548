"""How an opponent gets onto a vLLM server, and how it is noticed that the server has lost it."""

import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ..sampler import SamplerError
from .http_api import VLLMServer


logger = logging.getLogger(__name__)

_MAX_NUM_TRIES = 3


class OpponentLostError(Exception):
    """The server may not be playing the opponent any more: it was restarted, or somebody else loaded other weights."""


class Publisher(Protocol):
    """
    One way to get opponents onto a server.

    `publish` and `withdraw` are called on the main process, the rest on every process. `base` is the base model as the
    server lists it.
    """

    # Whether completions that have come back need `confirm` before they may be trusted.
    needs_confirmation: bool
    # Whether a server that missed an opponent, and plays an older one, is always told from one that plays it.
    notices_restarts: bool

    def publish(
        self, iteration: int, checkpoint: Path | None, base: dict[str, Any], earlier: Mapping[int, Path | None]
    ) -> None:
        """Have the server load the opponent, and the `earlier` ones beside it, in place of all others of this run."""

    def select(self, iteration: int, checkpoint: Path | None, base: dict[str, Any]) -> str:
        """Return the name of the model to ask for. Asks the server nothing, so it cannot fail on one process alone."""

    def confirm(self) -> None:
        """
        Raises:
            `OpponentLostError`: unless the server plays the opponent, and has done so since it was first confirmed.
        """

    def restore(self, iteration: int, checkpoint: Path | None, base: dict[str, Any]) -> None:
        """Have a server that lost the selected opponent load it again, unless another process was faster."""

    def withdraw(self) -> None:
        """Free, if that is easy, what is left on the server."""


class AdapterPublisher:
    """
    A [`Publisher`] of LoRA opponents: adapters with names of their own per run and iteration, so that no cached prefix
    of an older one is ever served, and a server that has lost one says so when it is asked for.

    Args:
        server ([`VLLMServer`]): The server.
        run_name (`str`): Begins every adapter's name.
    """

    needs_confirmation = False
    notices_restarts = True

    def __init__(self, server: VLLMServer, run_name: str):
        self.server = server
        self.run_name = run_name
        self._published: set[str] = set()

    def publish(
        self, iteration: int, checkpoint: Path | None, base: dict[str, Any], earlier: Mapping[int, Path | None]
    ) -> None:
        newest = self._name(iteration)
        loaded = {model["id"] for model in self.server.served_models()}
        if newest in loaded:
            self.server.unload_adapter(newest)
        # An earlier one that is loaded is what it was: its files do not change.
        wanted = {self._name(number): path for number, path in {**earlier, iteration: checkpoint}.items()}
        wanted = {name: path for name, path in wanted.items() if path is not None}
        for name, path in wanted.items():
            if name not in loaded or name == newest:
                self.server.load_adapter(name, str(path))
        if wanted:
            for name in sorted(self._published & loaded - set(wanted)):
                self.server.unload_adapter(name)
            self._published = set(wanted)

    def select(self, iteration: int, checkpoint: Path | None, base: dict[str, Any]) -> str:
        return base["id"] if checkpoint is None else self._name(iteration)

    def confirm(self) -> None:
        pass

    def restore(self, iteration: int, checkpoint: Path | None, base: dict[str, Any]) -> None:
        if checkpoint is not None:
            self.server.load_adapter(self._name(iteration), str(checkpoint))

    def withdraw(self) -> None:
        for name in sorted(self._published):
            self.server.try_to_unload_adapter(name)
        self._published = set()

    def _name(self, iteration: int) -> str:
        return f"{self.run_name}-iteration-{iteration}"


class WeightsPublisher:
    """
    A [`Publisher`] of full opponents, which replace the server's weights.

    A server that was restarted plays the base model again and says nothing. So each opponent comes with marks on the
    workers that hold its weights, unique to the loading: while they are there, so are the weights. They are removed
    before other weights are loaded.

    Args:
        server ([`VLLMServer`]): The server.
        run_name (`str`): Begins every mark.
    """

    needs_confirmation = True

    def __init__(self, server: VLLMServer, run_name: str):
        self.server = server
        self.run_name = run_name
        self._iteration = 0
        self._seen: frozenset[str] = frozenset()
        self._takes_marks = server.can_be_marked()
        if not self._takes_marks:
            logger.warning(
                f"The vLLM server at {server.base_url} does not let its workers be marked, so every broken connection "
                "is taken for a restart: the opponent is then published again."
            )

    @property
    def notices_restarts(self) -> bool:
        return self._takes_marks

    def publish(
        self, iteration: int, checkpoint: Path | None, base: dict[str, Any], earlier: Mapping[int, Path | None]
    ) -> None:
        assert not earlier  # weights replace each other
        self._remove_marks(but_of=None)
        self._load(iteration, str(checkpoint or base["root"]))

    def select(self, iteration: int, checkpoint: Path | None, base: dict[str, Any]) -> str:
        self._iteration = iteration
        self._seen = frozenset() if self._takes_marks else self._marks()
        return base["id"]

    def confirm(self) -> None:
        marks = self._marks()
        if not self._seen:  # the first look since the opponent was selected: what is there now must stay
            self._seen = self._loaded(marks, self._iteration)
        if not self._seen or not self._seen <= marks:
            raise OpponentLostError(
                "its workers no longer carry the marks of the opponent"
                if self._takes_marks
                else "a connection to it broke"
            )

    def restore(self, iteration: int, checkpoint: Path | None, base: dict[str, Any]) -> None:
        if not self._takes_marks or not self._loaded(self._marks(), iteration):
            self._load(iteration, str(checkpoint or base["root"]))
        self.select(iteration, checkpoint, base)

    def withdraw(self) -> None:
        pass  # weights take up no room of their own; the next run loads its own

    def _load(self, iteration: int, path: str) -> None:
        """Load weights and mark them; if the server was restarted in between, again."""
        for _ in range(_MAX_NUM_TRIES):
            # Several processes may do this at once: the same weights, under marks that say so.
            self._remove_marks(but_of=iteration)
            before = self._mark_loading(iteration)
            try:
                self.server.reload_weights(path)
            except SamplerError:
                if before <= self._marks():  # the server lives, and does not want these weights
                    raise
            if self._mark_loaded(iteration, before):
                return
        raise SamplerError(
            f"The vLLM server at {self.server.base_url} could not be made to play iteration {iteration}'s opponent: in "
            f"each of {_MAX_NUM_TRIES} attempts it was restarted, or lost what was loaded, before {path} was in place. "
            "See its log for why it ends, and see that no other run publishes to it."
        )

    # Without marks, the number of connections that broke takes their place: it changes with every restart.

    def _marks(self) -> frozenset[str]:
        if self._takes_marks:
            return self.server.marks()
        return frozenset([f"{self.server.num_broken_connections} broken connections"])

    def _loaded(self, marks: frozenset[str], iteration: int) -> frozenset[str]:
        return frozenset(mark for mark in marks if mark.startswith(f"{self._prefix(iteration)}loaded:"))

    def _mark_loading(self, iteration: int) -> frozenset[str]:
        """Marks by which it can be told afterwards that the server was not restarted."""
        if not self._takes_marks:
            return self._marks()
        mark = self._mark(iteration, "loading")
        self.server.add_mark(mark)
        return frozenset([mark])

    def _mark_loaded(self, iteration: int, loading: frozenset[str]) -> bool:
        """
        Mark the weights as loaded.

        Returns:
            `bool`: Whether they are: on a server that was not restarted since the marks `loading`, and by nobody else.
        """
        for _ in range(_MAX_NUM_TRIES):
            marks = self._marks()
            if not loading <= marks:
                return False
            if not self._takes_marks:
                return True
            if any(not mark.startswith(self._prefix(iteration)) for mark in marks):
                return False
            if self.server.try_to_add_mark(self._mark(iteration, "loaded")):
                return True
        return False

    def _remove_marks(self, but_of: int | None) -> None:
        """Before other weights are loaded: from now on no process takes an answer for an older opponent's."""
        if self._takes_marks:
            kept = None if but_of is None else self._prefix(but_of)
            for mark in self._marks():
                if kept is None or not mark.startswith(kept):
                    self.server.remove_mark(mark)

    def _mark(self, iteration: int, state: str) -> str:
        """A mark that was never used before."""
        return f"{self._prefix(iteration)}{state}:{secrets.token_hex(8)}"

    def _prefix(self, iteration: int) -> str:
        return f"{self.run_name}-iteration-{iteration}:"
