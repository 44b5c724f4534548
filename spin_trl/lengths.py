"""How long pairs are, told without making Python lists of their tokens. Knows nothing of batches."""

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset


_NUM_ROWS_AT_ONCE = 10_000


def pair_lengths(pairs: Dataset, max_length: int | None = None) -> np.ndarray:
    """
    Tokens of the longer of a pair's two sequences: what each of them is padded to.

    Args:
        pairs ([`~datasets.Dataset`]): With the columns `prompt_ids`, `chosen_ids` and `rejected_ids`.
        max_length (`int`, *optional*): Length at which DPOTrainer's collator truncates a sequence.

    Returns:
        `np.ndarray` of shape `(len(pairs),)` and integer type: prompt and longer side together.
    """
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    lengths = [np.zeros(0, dtype=np.int64)]
    for table in pairs.select_columns(columns).with_format("arrow").iter(batch_size=_NUM_ROWS_AT_ONCE):
        prompts, chosen, rejected = (pc.list_value_length(table[name]).to_numpy() for name in columns)
        lengths.append(prompts + np.maximum(chosen, rejected))
    return np.minimum(np.concatenate(lengths), np.iinfo(np.int64).max if max_length is None else max_length)
