"""How long pairs are, found without reading a token. Knows nothing of batches and models."""

import numpy as np
from datasets import Dataset

from .columns import list_lengths
from .pair_dataset import PairDataset


def pair_lengths(pairs: Dataset | PairDataset, max_length: int | None = None) -> np.ndarray:
    """
    Tokens of the longer of a pair's two sequences: what each of them is padded to.

    Args:
        pairs ([`PairDataset`] or [`~datasets.Dataset`]): With the columns `prompt_ids`, `chosen_ids` and
            `rejected_ids`.
        max_length (`int`, *optional*): Length at which DPOTrainer's collator truncates a sequence.

    Returns:
        `np.ndarray` of shape `(len(pairs),)` and integer type: prompt and longer side together.
    """
    sides = np.maximum(column_lengths(pairs, "chosen_ids"), column_lengths(pairs, "rejected_ids"))
    lengths = column_lengths(pairs, "prompt_ids") + sides
    return lengths if max_length is None else np.minimum(lengths, max_length)


def column_lengths(pairs: Dataset | PairDataset, column: str) -> np.ndarray:
    """Lengths of one column, of shape `(len(pairs),)`, in tokens."""
    return list_lengths(pairs.holder_of(column) if isinstance(pairs, PairDataset) else pairs, column)
