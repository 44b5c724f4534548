"""How long pairs are, found without reading a token. Knows nothing of batches and models."""

import numpy as np
from datasets import Dataset

from .columns import list_lengths
from .pair_dataset import PairDataset


def pair_lengths(pairs: Dataset | PairDataset) -> np.ndarray:
    """
    What each pair takes in a padded batch: the prompt with the longer of its two sides.

    Args:
        pairs ([`PairDataset`] or [`~datasets.Dataset`]): With the columns `prompt_ids`, `chosen_ids` and
            `rejected_ids`.

    Returns:
        `np.ndarray` of shape `(len(pairs),)`, in tokens.
    """
    sides = np.maximum(column_lengths(pairs, "chosen_ids"), column_lengths(pairs, "rejected_ids"))
    return column_lengths(pairs, "prompt_ids") + sides


def column_lengths(pairs: Dataset | PairDataset, column: str) -> np.ndarray:
    """Lengths of one column, of shape `(len(pairs),)`, in tokens."""
    return list_lengths(pairs.holder_of(column) if isinstance(pairs, PairDataset) else pairs, column)
