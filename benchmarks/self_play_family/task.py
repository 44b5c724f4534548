"""What a task is: data in parts, a model to start from, and a score. Knows nothing of how a model is improved."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase


Row = dict[str, str]  # `prompt` and `completion`
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Task:
    """
    Args:
        name (`str`): As on the command line and in file names.
        title (`str`), about (`str`): For the report.
        score_name (`str`): What `score` gives, with its unit.
        greater_is_better (`bool`): Of `score`.
        digits (`int`): Of `score` in tables.
        learning_rates (`tuple[float, ...]`): Six, ascending, among which each method's is searched.
        make_rows (`Callable[[], dict[str, list[Row]]]`): The rows of each of `PARTS`.
        make_start (`Callable[[Path, int | None], None]`):
            Trains the model that every method starts from, and saves it into a folder with its tokenizer. The number
            limits the steps, for a trial.
        score (`Callable[[PreTrainedModel, PreTrainedTokenizerBase, list[Row]], float]`): The task's own measure.
        num_iterations, epochs_per_iteration, batch_size (`int`): The same for every method.
        max_rows (`int`, *optional*): The most rows of a part, for a trial.
    """

    name: str
    title: str
    about: str
    score_name: str
    greater_is_better: bool
    digits: int
    learning_rates: tuple[float, ...]
    make_rows: Callable[[], dict[str, list[Row]]]
    make_start: Callable[[Path, int | None], None]
    score: Callable[[PreTrainedModel, PreTrainedTokenizerBase, list[Row]], float]
    num_iterations: int = 3
    epochs_per_iteration: int = 2
    batch_size: int = 32
    max_rows: int | None = None

    def rows(self) -> dict[str, list[Row]]:
        return {part: rows[: self.max_rows] for part, rows in self.make_rows().items()}

    def steps_per_iteration(self, num_rows: int) -> int:
        return -(-num_rows // self.batch_size) * self.epochs_per_iteration

    def shortened(self) -> "Task":
        """The task on little data, to see that everything runs. Its scores mean nothing."""
        return replace(self, num_iterations=1, epochs_per_iteration=1, max_rows=8)

    def describe(self) -> dict[str, Any]:
        """Its numbers and words, without its functions."""
        described = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in described.items() if not callable(value)}


def accuracy(answers: list[str], rows: list[Row]) -> float:
    """Share of answers that equal the ground truth, in percent."""
    return 100 * sum(a == row["completion"] for a, row in zip(answers, rows, strict=True)) / len(rows)
