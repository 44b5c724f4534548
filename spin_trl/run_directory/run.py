"""`Run`: where a run started, how it stands, and why it is over. Knows nothing of files and of what decides that."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoints import Place


@dataclass(frozen=True)
class RunStart:
    """
    Where a run starts.

    Args:
        is_resumed (`bool`): Whether it goes on with what is on disk.
        checkpoint (`Path`, *optional*): What to load. `None` for the initial model.
        ended (`str`, *optional*): Why nothing at all is left to do, if so, and how to play on.
        returned_to (`int`, *optional*): Whose opponent is its final policy, if not what the checkpoint holds.
    """

    place: Place
    is_resumed: bool = False
    checkpoint: Path | None = None
    is_trained: bool = False
    ended: str | None = None
    returned_to: int | None = None

    @property
    def iteration(self) -> int:
        """Number of the iteration to play, or to go on with."""
        return self.place.iteration + self.place.is_iteration_done

    @property
    def num_steps(self) -> int:
        """Steps of `iteration` that are done."""
        return 0 if self.place.is_iteration_done else self.place.num_steps

    @property
    def is_finished(self) -> bool:
        return self.ended is not None

    def __str__(self) -> str:
        source = "the initial model" if self.checkpoint is None else self.checkpoint.name
        if self.returned_to is not None:
            source = f"the opponent of iteration {self.returned_to}"
        if self.ended is not None:
            return f"The run in `output_dir` is complete; its final policy is {source}. {self.ended}"
        stage = f"iteration {self.iteration}, after {self.num_steps} of its steps"
        return f"The run in `output_dir` goes on from {source}: {'all training is done' if self.is_trained else stage}."


class RunEnd(Exception):
    """
    Self-play is over before its last iteration.

    Args:
        iteration (`int`): Whose opponent is the policy that the run ends with.
        rule (`str`): The rule that says so, by these `numbers`.
        returned_to (`int`, *optional*): Whose opponent is to be the policy instead.
    """

    kind: str  # what `self_play.json` calls it

    def __init__(self, message: str, iteration: int, rule: str, returned_to: int | None = None, **numbers: float):
        super().__init__(message)
        self.iteration = iteration
        self.rule = rule
        self.returned_to = returned_to
        self.numbers = numbers

    def describe(self) -> dict[str, Any]:
        """For `self_play.json`."""
        described = {"iteration": self.iteration, "rule": self.rule, **self.numbers, "message": str(self)}
        return described if self.returned_to is None else {**described, "returned_to": self.returned_to}


@dataclass
class Run:
    """
    The state of a run.

    Args:
        place ([`Place`], *optional*): Where the iteration that is trained on began. `None` before the first.
        end ([`RunEnd`], *optional*): Why it is over before its last iteration, if it is.
    """

    start: RunStart = RunStart(Place(""))
    place: Place | None = None
    end: RunEnd | None = None

    def begin(self, start: RunStart) -> None:
        """Forget an earlier `train()`."""
        self.__init__(start)

    @property
    def iteration(self) -> int | None:
        """Number of the iteration whose pairs are trained on. `None` before the first."""
        return None if self.place is None else self.place.iteration

    @property
    def next_opponent(self) -> int:
        """Number of the iteration whose opponent the policy is when all training is done."""
        if self.place is not None:
            return self.place.iteration + 1
        return self.start.iteration + (self.start.is_trained and self.start.num_steps > 0)

    @property
    def returned_to(self) -> int | None:
        """Whose opponent is to be the final policy, if not the last one's."""
        return self.start.returned_to if self.end is None else self.end.returned_to
