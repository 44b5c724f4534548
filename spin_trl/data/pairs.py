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
from .pair_dataset import PREFERENCE, PairDataset, column_lengths


# What an iteration adds to the run's data; its scores come later.
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


def answer_schema(has_opponents: bool) -> pa.Schema:
    """What an iteration adds to the run's data, with `opponent` where several take part."""
    return pa.schema([*ANSWER_SCHEMA, OPPONENT_FIELD]) if has_opponents else ANSWER_SCHEMA


class NoPairsError(RuntimeError):
    """No pair of an iteration has two sides that can be told apart: there is nothing left to learn from."""


def make_answers(data: Dataset, completions: Iterable[pa.Table], iteration: int) -> Iterator[pa.Table]:
    """
    The opponent's side of every pair, batch by batch. Completions of rows that the data lack are left out.

    Args:
        data ([`~datasets.Dataset`]): With the columns `row` and `source_row`.
        completions (`Iterable[pyarrow.Table]`): With the columns `row`, `sample` and `completion_ids`, perhaps with
            `opponent`.
        iteration (`int`): The iteration in which they were made.

    Returns:
        `Iterator[pyarrow.Table]`: of [`answer_schema`], with `opponent` where the completions have it.
    """
    rows, source_rows = numbers(data, "row"), numbers(data, "source_row")
    for batch in completions:
        positions, found = positions_of(batch["row"].to_numpy(), rows)
        batch = batch.filter(pa.array(found))
        schema = answer_schema(OPPONENT in batch.column_names)
        columns = {
            **{name: batch[name] for name in ("row", "sample", OPPONENT) if name in schema.names},
            "iteration": np.full(len(batch), iteration, np.int32),
            "source_row": source_rows[positions],
            "rejected_ids": batch["completion_ids"],
        }
        yield pa.table(columns, schema=schema)


def find_identical_pairs(pairs: PairDataset) -> np.ndarray:
    """Which pairs have two equal sides, a mask of shape `(len(pairs),)`."""
    return equal_lists(pairs.batches(_SIDES), *_SIDES)


def drop_identical_pairs(pairs: PairDataset, is_identical: np.ndarray) -> PairDataset:
    """
    Leave out the pairs whose two sides are equal.

    Args:
        pairs ([`PairDataset`]): All of them.
        is_identical (`np.ndarray` of shape `(len(pairs),)`): See [`find_identical_pairs`].

    Raises:
        `NoPairsError`: if no pair is left.
    """
    if is_identical.all() and "chosen_sample" in pairs.column_names:  # chosen by rewards
        raise NoPairsError(
            f"Both sides of all {len(pairs)} pairs of this iteration are the same, token by token, although their "
            "rewards differ: there is nothing to tell apart. See whether the reward functions give one text two "
            "rewards, raise `temperature`, or set `identical_pairs='keep'`."
        )
    if is_identical.all():
        raise NoPairsError(
            f"The opponent reproduces the ground truth in all {len(pairs)} pairs of this iteration, so self-play has "
            "converged: there is nothing left to tell apart. The policy is the last iteration's. To go on, use more "
            "or other data, raise `temperature`, or set `identical_pairs='keep'`."
        )
    return pairs.select(np.flatnonzero(~is_identical)) if is_identical.any() else pairs


def add_history(pairs: PairDataset, previous: list[tuple[int, PairDataset]]) -> PairDataset:
    """
    Join the pairs that older opponents made to the new ones. They are to be scored anew, so their scores are left out.

    Args:
        pairs ([`PairDataset`]): The new ones.
        previous (`list[tuple[int, PairDataset]]`): Iteration number and training set of each older iteration to join.
            Of each only the pairs that its own opponent made are taken.
    """
    own = [older.select(np.flatnonzero(numbers(older.answers, "iteration") == number)) for number, older in previous]
    return _concatenate(pairs, [(older.truths, older.answers) for older in own])


def add_preferences(pairs: PairDataset, preferences: Dataset | None) -> PairDataset:
    """
    Join the preference pairs, where there are any, to an iteration's. They have no rewards.

    Args:
        pairs ([`PairDataset`]): The iteration's, with its history, not scored yet.
        preferences ([`~datasets.Dataset`], *optional*): See [`PreparedPreferences`].
    """
    return _concatenate(pairs, [] if preferences is None else [(preferences, preferences)])


def _concatenate(pairs: PairDataset, others: list[tuple[Dataset, Dataset]]) -> PairDataset:
    """Further truths and answers behind those of the pairs, with the same columns: nulls where they lack one."""

    def joined(own: Dataset, further: tuple[Dataset, ...]) -> Dataset:
        names = set(own.column_names)
        return concatenate_datasets(
            [own, *(other.select_columns([n for n in other.column_names if n in names]) for other in further)]
        )

    if not others:
        return pairs
    truths, answers = zip(*others, strict=True)
    return PairDataset(joined(pairs.truths, truths), joined(pairs.answers, answers))


def preference_share(pairs: PairDataset) -> dict[str, float]:
    """Which share of an iteration's training set are preference pairs, as a metric, if any are."""
    is_preference = numbers(pairs.answers, "iteration") == PREFERENCE
    return {"preference_share": float(is_preference.mean())} if is_preference.any() else {}


def describe_pairs(
    pairs: PairDataset, is_identical: np.ndarray, cut_off_share: float, max_length: int | None = None
) -> dict[str, float]:
    """
    Shares and mean lengths by which one sees how the opponent's answers compare with the ground truth.

    Args:
        pairs ([`PairDataset`]): As made, the identical ones included.
        is_identical (`np.ndarray` of shape `(len(pairs),)`): See [`find_identical_pairs`].
        cut_off_share (`float`): Share of the completions that ran into the length limit.
        max_length (`int`, *optional*): Length at which DPOTrainer's collator truncates a prompt with one side.
    """
    limit = np.inf if max_length is None else max_length
    prompts, chosen, rejected = (column_lengths(pairs, name) for name in ("prompt_ids", *_SIDES))
    return {
        "num_pairs": len(pairs),
        "chosen_length": chosen.mean().item(),
        "rejected_length": rejected.mean().item(),
        "chosen_truncated_share": (prompts + chosen > limit).mean().item(),
        "rejected_truncated_share": (prompts + rejected > limit).mean().item(),
        "cut_off_share": cut_off_share,
        "identical_share": is_identical.mean().item(),
    }
