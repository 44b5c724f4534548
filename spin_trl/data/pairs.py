"""Completions -> preference pairs: the ground truth is chosen, the opponent's answer rejected. Knows no models.

Where rewards choose instead, `rewards/ranked_pairs.py` goes on from here. No function here holds the pairs: they pass
through it in batches, or it gives a view of them.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from .columns import equal_lists, numbers, positions_of
from .draw import OPPONENT, OPPONENT_FIELD
from .pair_dataset import PairDataset


# What an iteration adds to the run's data, with `opponent` where several take part. Rewards and scores come later.
ANSWER_SCHEMA = pa.schema(
    [
        ("iteration", pa.int32()),
        ("row", pa.int64()),
        ("source_row", pa.int64()),
        ("sample", pa.int32()),
        ("rejected_ids", pa.list_(pa.int32())),
    ]
)

_SIDES = ("chosen_ids", "rejected_ids")


class NoPairsError(RuntimeError):
    """No pair of an iteration has two sides that can be told apart: there is nothing left to learn from."""


def make_answers(data: Dataset, completions: Iterable[pa.Table], iteration: int) -> Iterator[pa.Table]:
    """
    The opponent's side of every pair, batch by batch, of `ANSWER_SCHEMA`. Completions of rows that the data lack are
    left out.

    Args:
        data ([`~datasets.Dataset`]): With the columns `row` and `source_row`.
        completions (`Iterable[pyarrow.Table]`): With the columns `row`, `sample` and `completion_ids`, perhaps with
            `opponent`.
        iteration (`int`): The iteration in which they were made.
    """
    rows, source_rows = numbers(data, "row"), numbers(data, "source_row")
    for batch in completions:
        positions, found = positions_of(batch["row"].to_numpy(), rows)
        batch = batch.filter(pa.array(found)).rename_columns({"completion_ids": "rejected_ids"})
        batch = batch.append_column("iteration", pa.array(np.full(len(batch), iteration, np.int32)))
        batch = batch.append_column("source_row", pa.array(source_rows[positions]))
        schema = ANSWER_SCHEMA.append(OPPONENT_FIELD) if OPPONENT in batch.column_names else ANSWER_SCHEMA
        yield batch.select(schema.names).cast(schema)


def find_identical_pairs(pairs: PairDataset) -> np.ndarray:
    """Which pairs have two equal sides, a mask of shape `(len(pairs),)`."""
    return equal_lists(pairs.batches(_SIDES), *_SIDES)


def drop_identical_pairs(pairs: PairDataset, is_identical: np.ndarray) -> PairDataset:
    """
    Leave out the pairs whose two sides are equal, as [`find_identical_pairs`] has found them.

    Raises:
        `NoPairsError`: if no pair is left.
    """
    if not is_identical.all():
        return pairs.select(np.flatnonzero(~is_identical)) if is_identical.any() else pairs
    if "chosen_sample" in pairs.column_names:  # chosen by rewards
        raise NoPairsError(
            f"Both sides of all {len(pairs)} pairs of this iteration are the same, token by token, although their "
            "rewards differ: there is nothing to tell apart. See whether the reward functions give one text two "
            "rewards, raise `temperature`, or set `identical_pairs='keep'`."
        )
    raise NoPairsError(
        f"The opponent reproduces the ground truth in all {len(pairs)} pairs of this iteration, so self-play has "
        "converged: there is nothing left to tell apart. The policy is the last iteration's. To go on, use more "
        "or other data, raise `temperature`, or set `identical_pairs='keep'`."
    )


def add_history(pairs: PairDataset, previous: list[tuple[int, PairDataset]]) -> PairDataset:
    """
    Join the pairs that older opponents made to the new ones. They are to be scored anew, so their scores are left out.

    Args:
        pairs ([`PairDataset`]): The new ones.
        previous (`list[tuple[int, PairDataset]]`): Iteration number and training set of each older iteration to join.
            Of each only the pairs that its own opponent made are taken.
    """
    own = [older.select(np.flatnonzero(numbers(older.answers, "iteration") == number)) for number, older in previous]
    return _concatenate(pairs, own)


def add_preferences(pairs: PairDataset, preferences: Dataset | None) -> PairDataset:
    """Join the user's preference pairs, if any, to an iteration's with its history. They have no rewards."""
    return _concatenate(pairs, [] if preferences is None else [PairDataset(preferences, preferences)])


def _concatenate(pairs: PairDataset, others: list[PairDataset]) -> PairDataset:
    """The others behind the pairs, with the same columns: nulls where they lack one."""

    def joined(own: Dataset, *further: Dataset) -> Dataset:
        shared = [[name for name in other.column_names if name in own.column_names] for other in further]
        return concatenate_datasets(
            [own, *(other.select_columns(names) for other, names in zip(further, shared, strict=True))]
        )

    if not others:
        return pairs
    truths = joined(pairs.truths, *(other.truths for other in others))
    return PairDataset(truths, joined(pairs.answers, *(other.answers for other in others)))
