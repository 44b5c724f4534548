"""How long pairs are, found without reading a token. Knows nothing of batches and models."""

import numpy as np
from datasets import Dataset

from .columns import list_lengths
from .pair_dataset import PairDataset


def pair_lengths(pairs: Dataset | PairDataset, max_length: int | None = None) -> np.ndarray:
    """
    Tokens of the longest of a pair's sequences, two or three: what each of them is padded to.

    Args:
        pairs ([`PairDataset`] or [`~datasets.Dataset`]): With the columns `prompt_ids`, `chosen_ids` and
            `rejected_ids`, perhaps `initial_ids`.
        max_length (`int`, *optional*): Length at which DPOTrainer's collator truncates a sequence.

    Returns:
        `np.ndarray` of shape `(len(pairs),)` and integer type: prompt and longest side together.
    """
    sides = [name for name in ("chosen_ids", "rejected_ids", "initial_ids") if name in pairs.column_names]
    longest = np.maximum.reduce([column_lengths(pairs, name) for name in sides])
    lengths = column_lengths(pairs, "prompt_ids") + longest
    return lengths if max_length is None else np.minimum(lengths, max_length)


def column_lengths(pairs: Dataset | PairDataset, column: str) -> np.ndarray:
    """Lengths of one column, of shape `(len(pairs),)`, in tokens."""
    return list_lengths(pairs.holder_of(column) if isinstance(pairs, PairDataset) else pairs, column)
