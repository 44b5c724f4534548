"""`Run`: how a run stands; `RunEnd`: self-play is over before its last iteration. Knows nothing of why."""

from dataclasses import dataclass
from typing import Any

from .checkpoints import Place
from .resume import RunStart
from .store import IterationStore


class RunEnd(Exception):
    """
    Self-play is over before its last iteration.

    Args:
        message (`str`): Why, in words and numbers.
        iteration (`int`): Whose opponent is the policy that the run ends with.
        rule (`str`): The rule that says so.
        returned_to (`int`, *optional*): Whose opponent is to be the policy instead.
        numbers (`float`): By which the rule says so.
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
    The state of a run. Steps are optimizer steps.

    Args:
        start ([`RunStart`]): Where it began, or goes on from.
        iteration (`int`, *optional*): The iteration whose pairs are trained on. `None` before the first.
        first_step (`int`): Steps of the run before that iteration.
        steps_per_epoch (`int`): Steps of each of its epochs.
        num_epochs (`int`): Its epochs.
        end ([`RunEnd`], *optional*): Why it is over before its last iteration, if it is.
    """

    start: RunStart = RunStart("")
    iteration: int | None = None
    first_step: int = 0
    steps_per_epoch: int = 0
    num_epochs: int = 1
    end: RunEnd | None = None

    def begin(self, start: RunStart) -> None:
        """Forget an earlier `train()`."""
        self.__init__(start)

    def is_iteration_done(self, step: int) -> bool:
        """Whether the last step of the iteration has been taken."""
        return step - self.first_step >= self.steps_per_epoch * self.num_epochs

    def place(self, step: int, store: IterationStore, holds_optimizer: bool) -> Place:
        """The place in the run of a checkpoint of this step."""
        return Place(
            run_id=store.run_id,
            step=step,
            iteration=self.iteration,
            first_step=self.first_step,
            steps_per_epoch=self.steps_per_epoch,
            num_epochs=self.num_epochs,
            pairs=store.pairs_checksum(self.iteration),
            holds_optimizer=holds_optimizer,
        )

    @property
    def next_opponent(self) -> int:
        """Number of the iteration whose opponent the policy is when all training is done."""
        return self.start.next_iteration if self.iteration is None else self.iteration + 1

    @property
    def returned_to(self) -> int | None:
        """Whose opponent is to be the final policy, if not the last one's."""
        return self.start.returned_to if self.end is None else self.end.returned_to
