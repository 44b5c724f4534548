"""Completions -> preference pairs: the ground truth is chosen, the opponent's answer rejected. Knows no models.

Where rewards choose instead, `rewards/ranked_pairs.py` goes on from here. No function here holds the pairs: they pass
through it in batches, or it gives a view of them.
"""

from collections.abc import Iterable, Iterator
from itertools import chain

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from .columns import batches, numbers, positions_of
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
    left out. The data have the columns `row` and `source_row`, completions `row`, `sample`, `completion_ids`, and
    `opponent` where several take part.
    """
    rows, source_rows = numbers(data, "row"), numbers(data, "source_row")
    for batch in completions:
        positions, found = positions_of(batch["row"].to_numpy(), rows)
        batch = batch.filter(pa.array(found)).rename_columns({"completion_ids": "rejected_ids"})
        batch = batch.append_column("iteration", pa.array(np.full(len(batch), iteration, np.int32)))
        batch = batch.append_column("source_row", pa.array(source_rows[positions]))
        schema = ANSWER_SCHEMA.append(OPPONENT_FIELD) if OPPONENT in batch.column_names else ANSWER_SCHEMA
        yield batch.select(schema.names).cast(schema)


def find_identical_pairs(pairs: Dataset | PairDataset) -> np.ndarray:
    """Which pairs have two equal sides, a mask of shape `(len(pairs),)`."""
    tables = pairs.batches(_SIDES) if isinstance(pairs, PairDataset) else batches(pairs, _SIDES)
    sides = chain.from_iterable(zip(*(table[name] for name in _SIDES), strict=True) for table in tables)
    return np.fromiter((chosen.equals(rejected) for chosen, rejected in sides), bool)


def drop_identical_pairs(pairs: PairDataset, is_identical: np.ndarray) -> PairDataset:
    """Leave out the pairs that [`find_identical_pairs`] has found. `NoPairsError` if none is left."""
    if not is_identical.all():
        return pairs.select(np.flatnonzero(~is_identical)) if is_identical.any() else pairs
    found = (
        f"The opponent reproduces the ground truth in all {len(pairs)} pairs of this iteration, so self-play has "
        "converged. The policy is the last iteration's. To go on, use more or other data"
    )
    if "chosen_sample" in pairs.column_names:  # chosen by rewards
        found = (
            f"Both sides of all {len(pairs)} pairs of this iteration are the same, although their rewards differ. See "
            "whether the reward functions give one text two rewards"
        )
    raise NoPairsError(f"{found}, raise `temperature`, or set `identical_pairs='keep'`.")


def add_older_pairs(
    pairs: PairDataset, previous: Iterable[tuple[int, PairDataset]], preferences: Dataset | None = None
) -> PairDataset:
    """
    Join older pairs to an iteration's new ones, with the same columns, null where they have none. All are to be scored
    anew, so scores are left out. Of each older iteration, given by its number and training set, only the pairs that its
    own opponent made are taken. The `preferences` are the user's pairs.
    """
    others = [older.select(np.flatnonzero(numbers(older.answers, "iteration") == number)) for number, older in previous]
    if preferences is not None:
        others.append(PairDataset(preferences, preferences))
    if not others:
        return pairs

    def join(own: Dataset, *further: Dataset) -> Dataset:
        known = set(own.column_names)
        return concatenate_datasets(
            [own, *(one.select_columns([name for name in one.column_names if name in known]) for one in further)]
        )

    truths = join(pairs.truths, *(other.truths for other in others))
    return PairDataset(truths, join(pairs.answers, *(other.answers for other in others)))
