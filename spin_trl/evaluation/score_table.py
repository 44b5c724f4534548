"""What an opponent's answers to the evaluation prompts are worth, and the table that shows it as the run goes."""

from collections.abc import Callable, Iterable
from numbers import Real

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data.columns import batches, numbers


# (prompts, references, generations) -> metrics
GenerationMetrics = Callable[[list, list[str], list[str]], dict[str, float]]


def generation_metrics(
    compute: GenerationMetrics, dataset: Dataset, completions: Iterable[pa.Table], tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """
    The user's metrics over the answers to the evaluation prompts.

    References and generations are both decoded from token ids, without special tokens, so that equal ids give equal
    text. Prompts are passed as they are in the dataset.

    Args:
        compute (`Callable`): The user's. It is given all texts at once, so the evaluation data must fit into memory.
        dataset ([`~datasets.Dataset`]): With the columns `row`, `prompt` and `chosen_ids`.
        completions (`Iterable[pyarrow.Table]`): The answers, sorted by row.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Gives their text.

    Raises:
        `TypeError`: if `compute` returns anything but a dict of numbers.
    """
    order = np.argsort(numbers(dataset, "row"), kind="stable")
    rows = dataset.select(order)

    def texts(tables: Iterable[pa.Table], column: str) -> list[str]:
        ids = (table[column].to_pylist() for table in tables)
        return [text for batch in ids for text in tokenizer.batch_decode(batch, skip_special_tokens=True)]

    references = texts(batches(rows, ["chosen_ids"]), "chosen_ids")
    metrics = compute(list(rows["prompt"]), references, texts(completions, "completion_ids"))
    if not isinstance(metrics, dict) or not all(isinstance(value, Real) for value in metrics.values()):
        raise TypeError(
            f"`compute_generation_metrics` must return a dict of numbers, such as {{'accuracy': 0.5}}, got {metrics!r}."
        )
    return {name: float(value) for name, value in metrics.items()}


class ScoreTable:
    """A table that is printed row by row, as its rows become known."""

    def __init__(self, print_line: Callable[[str], None] = print):
        self.print_line = print_line
        self.columns: list[str] = []

    def add(self, label: str, scores: dict[str, float]) -> None:
        """Print one row, and before the first one the header."""
        if not self.columns:
            self.columns = list(scores)
            self._print(["after", *self.columns])
            self._print(["-" * len(cell) for cell in ["iteration 0", *self.columns]])
        self._print([label, *(f"{scores[name]:.4f}" if name in scores else "" for name in self.columns)])

    def _print(self, cells: list[str]) -> None:
        widths = [len("iteration 100"), *(max(len(name), len("-10000.0000")) for name in self.columns)]
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        self.print_line("  ".join(padded))
