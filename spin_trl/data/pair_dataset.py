"""Pairs as a trainer reads them: each joined, when it is read, from the run's data and what an iteration adds to it.

Knows nothing of files and models.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset

from ..run_directory.run_paths import RunDirectoryError
from .columns import batches, numbers, positions_of


TRUTH_COLUMNS = ["prompt_ids", "chosen_ids"]
PREFERENCE = -1  # `iteration` of the user's preference pairs, which no opponent has answered
TRUTH = -1  # number of a side's sample where that is the ground truth


class PairDataset(torch.utils.data.Dataset):
    """
    Differs from a [`~datasets.Dataset`] with the same columns in where they lie: prompts and ground truths once for all
    pairs of all iterations, and the rest here. No row is copied, whatever is selected.

    Args:
        truths ([`~datasets.Dataset`]): For each pair its `prompt_ids` and, where the ground truth is chosen, its
            `chosen_ids`.
        answers ([`~datasets.Dataset`]): For each pair its other columns.
        *others ([`~datasets.Dataset`]): For each pair what else it is joined with.
    """

    def __init__(self, truths: Dataset, answers: Dataset, *others: Dataset):
        self.truths = truths
        self.answers = answers
        self.others = others

    @classmethod
    def join(cls, data: Dataset, answers: Dataset) -> "PairDataset":
        """
        Give every answer the prompt and the ground truth of its row. Answers that bring `chosen_ids` of their own keep
        these.

        Args:
            data ([`~datasets.Dataset`]): With the columns `row`, `prompt_ids` and `chosen_ids`.
            answers ([`~datasets.Dataset`]): With the column `row`.

        Raises:
            [`RunDirectoryError`]: if the data lack a row.
        """
        rows = numbers(answers, "row")
        positions, found = positions_of(rows, numbers(data, "row"))
        if not found.all():
            raise RunDirectoryError(
                f"The run's data have no row {rows[~found][0]}, which pairs are of: they are not of the same run. Play "
                "it again with `overwrite_output_dir=True`."
            )
        columns = [name for name in TRUTH_COLUMNS if name not in answers.column_names]
        return cls(data.select_columns(columns).select(positions), answers)

    def joined_with(self, other: Dataset) -> "PairDataset":
        """These pairs with further columns, of which `other` has a row for each."""
        return PairDataset(self.truths, self.answers, *self.others, other)

    @property
    def _holders(self) -> tuple[Dataset, ...]:
        return (self.answers, self.truths, *self.others)

    @property
    def column_names(self) -> list[str]:
        return [name for holder in self._holders for name in holder.column_names]

    def holder_of(self, column: str) -> Dataset:
        """The dataset that a column lies in."""
        return next((holder for holder in self._holders if column in holder.column_names), self.answers)

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, key: int | slice | Sequence[int] | str) -> Any:
        """A row, the columns of several rows, or a column, as [`~datasets.Dataset`] has it."""
        if isinstance(key, str):
            return self.holder_of(key)[key]
        return _merged(holder[key] for holder in self._holders)

    def __getitems__(self, keys: list[int]) -> list[dict[str, Any]]:
        rows = zip(*(holder.__getitems__(keys) for holder in self._holders), strict=True)
        return [_merged(parts) for parts in rows]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for parts in zip(*self._holders, strict=True):
            yield _merged(parts)

    def select(self, indices: Sequence[int] | np.ndarray) -> "PairDataset":
        """The pairs at these positions, in this order."""
        others = (other.select(indices) for other in self.others)
        return PairDataset(self.truths.select(indices), self.answers.select(indices), *others)

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Rows of some columns, or of all, so many at a time."""
        columns = self.column_names if columns is None else columns
        split = [(holder, [name for name in columns if self.holder_of(name) is holder]) for holder in self._holders]
        for parts in zip(*(batches(holder, names) for holder, names in split if names), strict=True):
            found = {name: part[name] for part in parts for name in part.column_names}
            yield pa.table({name: found[name] for name in columns})


def _merged(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.items()}
