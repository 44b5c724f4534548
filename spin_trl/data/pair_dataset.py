"""Pairs as a trainer reads them: each joined, when it is read, from the run's data and what an iteration adds to it.

Knows nothing of files and models.
"""

from collections import ChainMap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset

from ..objectives.third_side import INITIAL_IDS
from .columns import batches, list_lengths, numbers, positions_of


TRUTH_COLUMNS = ["prompt_ids", "chosen_ids"]
PREFERENCE = -1  # `iteration` of the user's preference pairs, which no opponent has answered
TRUTH = -1  # number of a side's sample where that is the ground truth


class PairDataset(torch.utils.data.Dataset):
    """
    Differs from a [`~datasets.Dataset`] with the same columns in where they lie: prompts and ground truths once for all
    pairs of all iterations, and the rest here. No row is copied, whatever is selected.

    `truths` have for each pair its `prompt_ids` and, where the ground truth is chosen, its `chosen_ids`; `answers` its
    other columns, and `others` what else it is joined with.
    """

    def __init__(self, truths: Dataset, answers: Dataset, *others: Dataset):
        self.truths = truths
        self.answers = answers
        self.holders = (answers, truths, *others)

    @classmethod
    def join(cls, data: Dataset, answers: Dataset) -> "PairDataset":
        """
        Give every answer the `prompt_ids` and `chosen_ids` of its `row`. Answers that bring their own keep them.
        `LookupError` if the data lack a row.
        """
        rows = numbers(answers, "row")
        positions, found = positions_of(rows, numbers(data, "row"))
        if not found.all():
            raise LookupError(f"The data have no row {rows[~found][0]}, which pairs are of.")
        columns = [name for name in TRUTH_COLUMNS if name not in answers.column_names]
        return cls(data.select_columns(columns).select(positions), answers)

    @property
    def column_names(self) -> list[str]:
        return [name for holder in self.holders for name in holder.column_names]

    def holder_of(self, column: str) -> Dataset:
        """The dataset that a column lies in."""
        return next((holder for holder in self.holders if column in holder.column_names), self.answers)

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, key: int | slice | Sequence[int] | str) -> Any:
        """A row, the columns of several rows, or a column, as [`~datasets.Dataset`] has it."""
        if isinstance(key, str):
            return self.holder_of(key)[key]
        return dict(ChainMap(*(holder[key] for holder in self.holders)))

    def __getitems__(self, keys: list[int]) -> list[dict[str, Any]]:
        parts = zip(*(holder.__getitems__(keys) for holder in self.holders), strict=True)
        return [dict(ChainMap(*maps)) for maps in parts]

    def select(self, indices: Sequence[int] | np.ndarray) -> "PairDataset":
        """The pairs at these positions, in this order."""
        answers, truths, *others = (holder.select(indices) for holder in self.holders)
        return PairDataset(truths, answers, *others)

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Rows of some columns, or of all, so many at a time."""
        columns = self.column_names if columns is None else columns
        split = [(holder, [name for name in columns if self.holder_of(name) is holder]) for holder in self.holders]
        for parts in zip(*(batches(holder, names) for holder, names in split if names), strict=True):
            found = {name: part[name] for part in parts for name in part.column_names}
            yield pa.table({name: found[name] for name in columns})


def column_lengths(pairs: Dataset | PairDataset, column: str) -> np.ndarray:
    """Lengths of one column, of shape `(len(pairs),)`, in tokens. No token is read."""
    return list_lengths(pairs.holder_of(column) if isinstance(pairs, PairDataset) else pairs, column)


def pair_lengths(pairs: Dataset | PairDataset, max_length: int | None = None) -> np.ndarray:
    """
    Tokens of the longest of a pair's sequences, two or three, of shape `(len(pairs),)`: what each of them is padded to,
    after DPOTrainer's collator has truncated it to `max_length`.
    """
    sides = [name for name in ("chosen_ids", "rejected_ids", INITIAL_IDS) if name in pairs.column_names]
    longest = np.maximum.reduce([column_lengths(pairs, name) for name in sides])
    lengths = column_lengths(pairs, "prompt_ids") + longest
    return lengths if max_length is None else np.minimum(lengths, max_length)
