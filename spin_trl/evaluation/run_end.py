"""`RunEnd`: self-play is over before its last iteration. Knows nothing of why."""

from typing import Any


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

    @property
    def result(self) -> int:
        """Whose opponent the run's result is."""
        return self.iteration if self.returned_to is None else self.returned_to

    def describe(self) -> dict[str, Any]:
        """For `self_play.json`."""
        described = {"iteration": self.iteration, "rule": self.rule, **self.numbers, "message": str(self)}
        return described if self.returned_to is None else {**described, "returned_to": self.returned_to}
