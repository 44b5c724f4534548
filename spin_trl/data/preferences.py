"""The user's preference pairs, rendered as the training data are, to be trained on beside those of every iteration.

They are no answers of an opponent, so their `iteration` is `PREFERENCE`, and their rows are numbered downwards from -1,
beside the run's own. Knows nothing of files, servers and models.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from accelerate.logging import get_logger
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from ..objectives.settings import check_settings
from ..spin_config import SPINConfig
from .columns import batches, equal_lists, numbers
from .games import InvalidRowError
from .pair_dataset import PREFERENCE
from .preparation import dataset_checksum, drop_long_prompts, render


logger = get_logger(__name__)

_SIDES = ("chosen", "rejected")
_SHARED_COLUMNS = ("prompt", "tools", "chat_template_kwargs")
_TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


class PreparedPreferences(NamedTuple):
    """
    Args:
        dataset ([`~datasets.Dataset`]): One row per pair, with the columns `iteration`, `row`, `source_row`, `sample`
            (0), `prompt_ids`, `chosen_ids` and `rejected_ids`.
        report (`dict[str, Any]`): Checksum and row counts, for `self_play.json`.
        invalid_rows (`list[dict]`): Dataset, row number and reason of every row left out.
    """

    dataset: Dataset
    report: dict[str, Any]
    invalid_rows: list[dict[str, Any]]


def check_preference_dataset(dataset: Any, loss_types: Sequence[str]) -> None:
    """
    Raises:
        `TypeError`: if it is no map-style dataset.
        `ValueError`: if it is empty or lacks a column, or one of the losses cannot use it.
    """
    expected = "`chosen`, `rejected` and, unless these are whole conversations, `prompt`"
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"`preference_dataset` must be a `datasets.Dataset` with the columns {expected}, got "
            f"`{type(dataset).__name__}`. Load one split with `datasets.load_dataset(..., split='train')`, without "
            "`streaming=True`."
        )
    check_settings(loss_types, {"preference_dataset": dataset})
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
    pairs, reasons = _render_sides(args, tokenizer, end_token_ids, dataset)
    is_identical = _equal(pairs, "chosen_ids", "rejected_ids")
    if is_identical.all():
        raise ValueError(
            f"No row of `preference_dataset` is left: of {len(dataset)}, {len(reasons)} are invalid and "
            f"{is_identical.sum()} have equal sides. See whether `chosen` and `rejected` hold the answers."
        )
    limit = context_length if args.max_length is None else min(args.max_length, context_length)
    pairs, num_long = drop_long_prompts(
        pairs.select(np.flatnonzero(~is_identical)), limit - 1, f"the limit of {limit} tokens for `preference_dataset`"
    )
    num_dropped = len(dataset) - len(pairs)
    if num_dropped:
        logger.warning(
            f"Left out {num_dropped} row(s) of `preference_dataset`: {len(reasons)} invalid, {is_identical.sum()} of "
            f"equal sides, {num_long} whose prompt leaves no room for an answer."
        )
    report = {
        "preference_checksum": dataset_checksum(pairs, _TOKEN_COLUMNS),
        "num_preference_rows": len(pairs),
        "num_dropped_preference_rows": num_dropped,
    }
    invalid = [{"dataset": "preference_dataset", "row": row, "reason": reasons[row]} for row in sorted(reasons)]
    columns = {
        "iteration": np.full(len(pairs), PREFERENCE, np.int32),
        "row": -1 - np.arange(len(pairs)),
        "sample": np.zeros(len(pairs), np.int32),
    }
    for name, values in columns.items():
        pairs = pairs.add_column(name, values)
    return PreparedPreferences(pairs, report, invalid)


def _render_sides(
    args: SPINConfig, tokenizer: PreTrainedTokenizerBase, end_token_ids: Collection[int], dataset: Dataset
) -> tuple[Dataset, dict[int, str]]:
    """Tokens of both sides of every valid row, and why the others are not."""
    shared = [name for name in _SHARED_COLUMNS if name in dataset.column_names]
    note = "In `preference_dataset`."
    chosen = render(args, tokenizer, end_token_ids, dataset.select_columns([*shared, "chosen"]), note)
    rejected = dataset.select_columns([*shared, "rejected"]).rename_column("rejected", "chosen")
    rejected = render(args, tokenizer, end_token_ids, rejected, f"{note} In its `rejected`, read as a `chosen`.")
    reasons = {row: f"its `rejected`, read as a `chosen`: {reason}" for row, reason in rejected.invalid_rows}
    reasons |= dict(chosen.invalid_rows)
    pairs = _side_by_side(chosen.dataset, rejected.dataset)
    same_prompt = _equal(pairs, "prompt_ids", "other_prompt_ids")
    for row in numbers(pairs, "source_row")[~same_prompt].tolist():
        reasons[row] = (
            "`chosen` and `rejected` answer different prompts (in conversations, all messages but the last). Cut both "
            "after the first answer in which they differ."
        )
        if not args.skip_invalid_rows:
            raise InvalidRowError(f"Row {row} of `preference_dataset`: {reasons[row]}")
    return pairs.remove_columns("other_prompt_ids").select(np.flatnonzero(same_prompt)), reasons


def _side_by_side(chosen: Dataset, rejected: Dataset) -> Dataset:
    """The rows that are valid on both sides, with the prompt of either."""
    rows = [numbers(side, "source_row") for side in (chosen, rejected)]
    _, *positions = np.intersect1d(*rows, assume_unique=True, return_indices=True)
    chosen, rejected = (side.select(found) for side, found in zip((chosen, rejected), positions, strict=True))
    names = {"prompt_ids": "other_prompt_ids", "chosen_ids": "rejected_ids"}
    rejected = rejected.select_columns(list(names)).rename_columns(names)
    return concatenate_datasets([chosen.select_columns(["source_row", "prompt_ids", "chosen_ids"]), rejected], axis=1)


def _equal(pairs: Dataset, left: str, right: str) -> np.ndarray:
    return equal_lists(batches(pairs, [left, right]), left, right)
