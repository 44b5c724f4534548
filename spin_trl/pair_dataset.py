"""Pairs as a trainer reads them: each joined, when it is read, from the run's data and what an iteration adds to it.

Knows nothing of files and models.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset

from .columns import batches, numbers, positions_of
from .run_paths import RunDirectoryError


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
    """

    def __init__(self, truths: Dataset, answers: Dataset):
        self.truths = truths
        self.answers = answers

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

    @property
    def column_names(self) -> list[str]:
        return [*self.answers.column_names, *self.truths.column_names]

    def holder_of(self, column: str) -> Dataset:
        """The dataset that a column lies in."""
        return self.truths if column in self.truths.column_names else self.answers

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, key: int | slice | Sequence[int] | str) -> Any:
        """A row, the columns of several rows, or a column, as [`~datasets.Dataset`] has it."""
        if isinstance(key, str):
            return self.holder_of(key)[key]
        return {**self.answers[key], **self.truths[key]}

    def __getitems__(self, keys: list[int]) -> list[dict[str, Any]]:
        sides = zip(self.answers.__getitems__(keys), self.truths.__getitems__(keys), strict=True)
        return [{**answer, **truth} for answer, truth in sides]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for answer, truth in zip(self.answers, self.truths, strict=True):
            yield {**answer, **truth}

    def select(self, indices: Sequence[int] | np.ndarray) -> "PairDataset":
        """The pairs at these positions, in this order."""
        return PairDataset(self.truths.select(indices), self.answers.select(indices))

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Rows of some columns, or of all, so many at a time."""
        columns = self.column_names if columns is None else columns
        split = [
            (side, [name for name in columns if self.holder_of(name) is side]) for side in (self.answers, self.truths)
        ]
        for sides in zip(*(batches(side, names) for side, names in split if names), strict=True):
            found = {name: side[name] for side in sides for name in side.column_names}
            yield pa.table({name: found[name] for name in columns})
