"""The user's preference pairs, rendered as the training data are, to be trained on beside those of every iteration.

They are no answers of an opponent, so their `iteration` is `PREFERENCE`, and their rows are numbered downwards from -1,
beside the run's own. Knows nothing of files, servers and models.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from datasets import Dataset, concatenate_datasets

from ..objectives.settings import check_settings
from .columns import batches, equal_lists, numbers
from .games import InvalidRowError
from .pair_dataset import PREFERENCE
from .rendering import TokenizedData
from .token_rows import drop_long_prompts


logger = get_logger(__name__)

PREFERENCE_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_SHARED_COLUMNS = ("prompt", "tools", "chat_template_kwargs")


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
    missing = [name for name in ("chosen", "rejected") if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"`preference_dataset` has the columns {dataset.column_names}, but lacks {missing}: expected are "
            f"{expected}. Rename them with `dataset.rename_columns({{...}})`; questions with one answer each belong in "
            "`train_dataset`."
        )
    if len(dataset) == 0:
        raise ValueError("`preference_dataset` is empty. Leave it out, or see what was filtered out of it.")


def prepare_preferences(
    tokenize: Callable[[Dataset], TokenizedData], dataset: Dataset, max_length: int, skip_invalid_rows: bool
) -> TokenizedData:
    """
    Render both sides of every pair, each as a ground truth is. Pairs of equal sides say nothing and are left out, as
    are those whose prompt leaves no room for an answer in `max_length` tokens.

    Returns:
        [`TokenizedData`] with one row per pair, of the columns `iteration`, `row`, `source_row`, `sample` (0) and
        `PREFERENCE_IDS`.

    Raises:
        [`InvalidRowError`]: naming the row, if it cannot be rendered or its two sides have different prompts, and
            `skip_invalid_rows` is not set.
        `ValueError`: if no row is left.
    """
    pairs, reasons = _render_sides(tokenize, dataset, skip_invalid_rows)
    is_identical = equal_lists(batches(pairs, PREFERENCE_IDS), "chosen_ids", "rejected_ids")
    if is_identical.all():
        raise ValueError(
            f"No row of `preference_dataset` is left: of {len(dataset)}, {len(reasons)} are invalid and "
            f"{is_identical.sum()} have equal sides. See whether `chosen` and `rejected` hold the answers."
        )
    pairs = pairs.select(np.flatnonzero(~is_identical))
    pairs, num_long = drop_long_prompts(pairs, max_length, "the limit for `preference_dataset`")
    if len(pairs) < len(dataset):
        logger.warning(
            f"Left out {len(dataset) - len(pairs)} row(s) of `preference_dataset`: {len(reasons)} invalid, "
            f"{is_identical.sum()} of equal sides, {num_long} whose prompt leaves no room for an answer."
        )
    columns = {
        "iteration": np.full(len(pairs), PREFERENCE, np.int32),
        "row": -1 - np.arange(len(pairs)),
        "sample": np.zeros(len(pairs), np.int32),
    }
    for name, values in columns.items():
        pairs = pairs.add_column(name, values)
    return TokenizedData(pairs, sorted(reasons.items()))


@contextmanager
def noting(note: str) -> Iterator[None]:
    """A refusal carries the note, which says of what."""
    try:
        yield
    except ValueError as error:
        error.add_note(note)
        raise


def _render_sides(
    tokenize: Callable[[Dataset], TokenizedData], dataset: Dataset, skip_invalid_rows: bool
) -> tuple[Dataset, dict[int, str]]:
    """Tokens of both sides of every valid row, and why the others are not."""
    shared = [name for name in _SHARED_COLUMNS if name in dataset.column_names]
    chosen = tokenize(dataset.select_columns([*shared, "chosen"]))
    with noting("In its `rejected`, read as a `chosen`."):
        rejected = tokenize(dataset.select_columns([*shared, "rejected"]).rename_column("rejected", "chosen"))
    reasons = {row: f"its `rejected`, read as a `chosen`: {reason}" for row, reason in rejected.invalid_rows}
    reasons |= dict(chosen.invalid_rows)
    # the rows that are valid on both sides, side by side
    rows = [numbers(side.dataset, "source_row") for side in (chosen, rejected)]
    _, *positions = np.intersect1d(*rows, assume_unique=True, return_indices=True)
    other = rejected.dataset.select_columns(["prompt_ids", "chosen_ids"]).select(positions[1])
    other = other.rename_columns({"prompt_ids": "other_prompt_ids", "chosen_ids": "rejected_ids"})
    pairs = chosen.dataset.select_columns(["source_row", "prompt_ids", "chosen_ids"]).select(positions[0])
    pairs = concatenate_datasets([pairs, other], axis=1)
    same_prompt = equal_lists(batches(pairs, ["prompt_ids", "other_prompt_ids"]), "prompt_ids", "other_prompt_ids")
    for row in numbers(pairs, "source_row")[~same_prompt].tolist():
        reasons[row] = (
            "`chosen` and `rejected` answer different prompts (in conversations, all messages but the last). Cut both "
            "after the first answer in which they differ."
        )
        if not skip_invalid_rows:
            raise InvalidRowError(f"Row {row}: {reasons[row]}")
    return pairs.remove_columns("other_prompt_ids").select(np.flatnonzero(same_prompt)), reasons
