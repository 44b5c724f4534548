"""The user's preference pairs, rendered as the training data are, to be trained on beside those of every iteration.

They are no answers of an opponent, so their `iteration` is `PREFERENCE`, and their rows are numbered downwards from -1,
beside the run's own. Knows nothing of files, servers and models.
"""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from accelerate.logging import get_logger
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import get_temporary_cache_files_directory
from transformers import PreTrainedTokenizerBase

from ..objectives.pairings import check_goes_with_preferences
from ..spin_config import SPINConfig
from .columns import batches, equal_lists, numbers, write_rows
from .games import InvalidRowError
from .pair_dataset import PREFERENCE, PairDataset
from .pairs import ANSWER_SCHEMA
from .preparation import dataset_checksum, drop_long_prompts
from .rendering import TokenizedData, tokenize_dataset


logger = get_logger(__name__)

_SIDES = ("chosen", "rejected")
_SHARED_COLUMNS = ("prompt", "tools", "chat_template_kwargs")
PREFERENCE_SCHEMA = pa.schema(
    [field for field in ANSWER_SCHEMA if field.name != "rejected_ids"]
    + [(name, pa.list_(pa.int32())) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
)


@dataclass
class PreparedPreferences:
    """
    Args:
        dataset ([`~datasets.Dataset`]): One row per pair, with the columns `iteration`, `row`, `source_row`, `sample`
            (0), `prompt_ids`, `chosen_ids` and `rejected_ids`.
        report (`dict[str, Any]`): Checksum and row counts, for `self_play.json`.
        invalid_rows (`list[dict]`): Dataset, row number and reason of every row left out.
    """

    dataset: Dataset
    report: dict[str, Any]
    invalid_rows: list[dict[str, Any]] = field(default_factory=list)


def check_preference_dataset(dataset: Any, loss_types: Sequence[str]) -> None:
    """
    Raises:
        `TypeError`: if it is no map-style dataset.
        `ValueError`: if it is empty or lacks a column, or one of the losses cannot use it.
    """
    check_goes_with_preferences(loss_types)
    expected = "`chosen`, `rejected` and, unless these are whole conversations, `prompt`"
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"`preference_dataset` must be a `datasets.Dataset` with the columns {expected}, got "
            f"`{type(dataset).__name__}`. Load one split with `datasets.load_dataset(..., split='train')`, without "
            "`streaming=True`."
        )
    missing = [name for name in _SIDES if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"`preference_dataset` has the columns {dataset.column_names}, but lacks {missing}: expected are "
            f"{expected}. Rename them with `dataset.rename_columns({{...}})`; questions with one answer each belong in "
            "`train_dataset`."
        )
    if len(dataset) == 0:
        raise ValueError("`preference_dataset` is empty. Leave it out, or see what was filtered out of it.")


def prepare_preferences(
    args: SPINConfig,
    tokenizer: PreTrainedTokenizerBase,
    end_token_ids: Collection[int],
    dataset: Dataset,
    context_length: int,
) -> PreparedPreferences:
    """
    Render both sides of every pair, each as a ground truth is. Pairs of equal sides say nothing and are left out, as
    are those whose prompt leaves no room for an answer.

    Args:
        args ([`SPINConfig`]): `chat_template_kwargs`, `skip_invalid_rows`, `max_length`, `dataset_num_proc`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]), end_token_ids (`Collection[int]`): As for
            [`rendering.tokenize_dataset`].
        dataset ([`~datasets.Dataset`]): The user's.
        context_length (`int`): Tokens that the model can hold.

    Raises:
        [`InvalidRowError`]: naming the row, if it cannot be rendered or its two sides have different prompts, and
            `skip_invalid_rows` is not set.
        `ValueError`: if no row is left.
    """
    sides = [_render(args, tokenizer, end_token_ids, dataset, side) for side in _SIDES]
    reasons = {row: f"its `rejected`, read as a `chosen`: {reason}" for row, reason in sides[1].invalid_rows}
    reasons |= dict(sides[0].invalid_rows)
    chosen, rejected = _side_by_side(*(side.dataset for side in sides))
    differing = ~_equal(chosen, rejected, "prompt_ids")
    for row in numbers(chosen, "source_row")[differing].tolist():
        reasons[row] = (
            "`chosen` and `rejected` answer different prompts (in conversations, all messages but the last). Cut both "
            "after the first answer in which they differ."
        )
        if not args.skip_invalid_rows:
            raise InvalidRowError(f"Row {row} of `preference_dataset`: {reasons[row]}")
    identical = _equal(chosen, rejected, "chosen_ids")
    kept = np.flatnonzero(~differing & ~identical)
    if len(kept) == 0:
        raise ValueError(
            f"No row of `preference_dataset` is left: of {len(dataset)}, {len(reasons)} are invalid and "
            f"{(identical & ~differing).sum()} have equal sides. See whether `chosen` and `rejected` hold the answers."
        )
    joined = _join(chosen.select(kept), rejected.select(kept))
    limit = context_length if args.max_length is None else min(args.max_length, context_length)
    joined, num_long = _noting(lambda: drop_long_prompts(joined, limit - 1, f"the limit of {limit} tokens"))
    report = {
        "preference_checksum": dataset_checksum(joined, ("prompt_ids", "chosen_ids", "rejected_ids")),
        "num_preference_rows": len(joined),
        "num_dropped_preference_rows": len(dataset) - len(joined),
    }
    if len(joined) < len(dataset):
        logger.warning(
            f"Left out {len(dataset) - len(joined)} row(s) of `preference_dataset`: {len(reasons)} invalid, "
            f"{(identical & ~differing).sum()} of equal sides, {num_long} whose prompt leaves no room for an answer."
        )
    invalid = [{"dataset": "preference_dataset", "row": row, "reason": reasons[row]} for row in sorted(reasons)]
    return PreparedPreferences(joined, report, invalid)


def add_preferences(pairs: PairDataset, preferences: Dataset | None) -> PairDataset:
    """
    Join the preference pairs, where there are any, to an iteration's. They have no rewards.

    Args:
        pairs ([`PairDataset`]): The iteration's, with its history, not scored yet.
        preferences ([`~datasets.Dataset`], *optional*): See [`PreparedPreferences`].
    """
    if preferences is None:
        return pairs
    known = [name for name in pairs.answers.column_names if name in preferences.column_names]
    return PairDataset(
        concatenate_datasets([pairs.truths, preferences.select_columns(pairs.truths.column_names)]),
        concatenate_datasets([pairs.answers, preferences.select_columns(known)]),  # nulls where columns are missing
    )


def preference_share(pairs: PairDataset) -> dict[str, float]:
    """Which share of an iteration's training set are preference pairs, as a metric, if any are."""
    is_preference = numbers(pairs.answers, "iteration") == PREFERENCE
    return {"preference_share": float(is_preference.mean())} if is_preference.any() else {}


def _render(
    args: SPINConfig, tokenizer: PreTrainedTokenizerBase, end_token_ids: Collection[int], dataset: Dataset, side: str
) -> TokenizedData:
    columns = [name for name in _SHARED_COLUMNS if name in dataset.column_names]
    one_side = dataset.select_columns([*columns, side])
    if side != "chosen":
        one_side = one_side.rename_column(side, "chosen")

    def render() -> TokenizedData:
        return tokenize_dataset(
            one_side,
            tokenizer,
            end_token_ids,
            chat_template_kwargs=args.chat_template_kwargs,
            skip_invalid_rows=args.skip_invalid_rows,
            num_proc=args.dataset_num_proc,
        )

    return _noting(render, f" In its `{side}`, read as a `chosen`." if side != "chosen" else "")


def _noting(function: Callable[[], Any], more: str = "") -> Any:
    """What a function returns; its error says that it is of this dataset."""
    try:
        return function()
    except ValueError as error:
        error.add_note(f"In `preference_dataset`.{more}")
        raise


def _side_by_side(chosen: Dataset, rejected: Dataset) -> tuple[Dataset, Dataset]:
    """The rows that are valid on both sides."""
    rows = [numbers(side, "source_row") for side in (chosen, rejected)]
    _, *positions = np.intersect1d(*rows, assume_unique=True, return_indices=True)
    return tuple(side.select(found) for side, found in zip((chosen, rejected), positions, strict=True))


def _equal(left: Dataset, right: Dataset, column: str) -> np.ndarray:
    both = zip(batches(left, [column]), batches(right, [column]), strict=True)
    return np.concatenate([np.empty(0, bool), *(equal_lists(one[column], other[column]) for one, other in both)])


def _join(chosen: Dataset, rejected: Dataset) -> Dataset:
    """Both sides of every pair, in a temporary file until the process ends."""

    def tables() -> Iterator[pa.Table]:
        number = 0
        sides = (batches(side, ["source_row", "prompt_ids", "chosen_ids"]) for side in (chosen, rejected))
        for one, other in zip(*sides, strict=True):
            columns = {
                "iteration": np.full(len(one), PREFERENCE),
                "row": -1 - np.arange(number, number + len(one)),
                "source_row": one["source_row"],
                "sample": np.zeros(len(one), np.int64),
                "prompt_ids": one["prompt_ids"],
                "chosen_ids": one["chosen_ids"],
                "rejected_ids": other["chosen_ids"],
            }
            number += len(one)
            yield pa.table(columns)

    path = Path(get_temporary_cache_files_directory(), f"preferences-{os.urandom(8).hex()}.arrow")
    write_rows(path, tables(), PREFERENCE_SCHEMA)
    return Dataset.from_file(str(path))
