"""The user's preference pairs, rendered as the training data are, to be trained on beside those of every iteration.

They are no answers of an opponent, so their `iteration` is `PREFERENCE`, and their rows are numbered downwards from -1,
beside the run's own. Knows nothing of files, servers and models.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from datasets import Dataset

from ..objectives.settings import check_settings
from .formats import check_is_dataset
from .pair_dataset import PREFERENCE
from .pairs import find_identical_pairs
from .rendering import TokenizedData
from .token_rows import drop_long_prompts


logger = get_logger(__name__)

PREFERENCE_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_COLUMNS = ("prompt", "tools", "chat_template_kwargs", "chosen", "rejected")


def check_preference_dataset(dataset: Any, loss_types: Sequence[str]) -> None:
    """As [`check_is_dataset`], and `ValueError` if it lacks a column, or one of the losses cannot use it."""
    check_is_dataset(dataset, "preference_dataset")
    check_settings(loss_types, {"preference_dataset": dataset})
    if missing := [name for name in ("chosen", "rejected") if name not in dataset.column_names]:
        raise ValueError(
            f"`preference_dataset` has the columns {dataset.column_names}, but lacks {missing}: expected are `chosen`, "
            "`rejected` and, unless these are whole conversations, `prompt`. Rename them with "
            "`dataset.rename_columns({...})`; questions with one answer each belong in `train_dataset`."
        )


def prepare_preferences(
    tokenize: Callable[..., TokenizedData], dataset: Dataset, max_length: int
) -> tuple[Dataset, list[tuple[int, str]]]:
    """
    Render both sides of every pair. Pairs of equal sides say nothing and are left out, as are those whose prompt leaves
    no room for an answer in `max_length` tokens.

    Returns:
        One row per pair, of the columns `iteration`, `row`, `source_row`, `sample` (0) and `PREFERENCE_IDS`; and the
        invalid rows, as [`TokenizedData`] has them. If no row is left, it is a `ValueError`.
    """
    own = dataset.select_columns([name for name in _COLUMNS if name in dataset.column_names])
    rendered, invalid_rows = tokenize(own, both_sides=True)
    is_identical = find_identical_pairs(rendered)
    if is_identical.all():
        raise ValueError(
            f"No row of `preference_dataset` is left: of {len(dataset)}, {len(invalid_rows)} are invalid and "
            f"{len(rendered)} have equal sides. See whether `chosen` and `rejected` hold the answers."
        )
    different = rendered.select_columns(["source_row", *PREFERENCE_IDS]).select(np.flatnonzero(~is_identical))
    pairs = drop_long_prompts(different, max_length, "the limit for `preference_dataset`")
    if len(pairs) < len(dataset):
        logger.warning(
            f"Left out {len(dataset) - len(pairs)} row(s) of `preference_dataset`: {len(invalid_rows)} invalid, "
            f"{is_identical.sum()} of equal sides, {len(different) - len(pairs)} whose prompt leaves no room for an "
            "answer."
        )
    pairs = pairs.add_column("iteration", np.full(len(pairs), PREFERENCE, np.int32))
    pairs = pairs.add_column("row", -1 - np.arange(len(pairs)))
    return pairs.add_column("sample", np.zeros(len(pairs), np.int32)), invalid_rows
