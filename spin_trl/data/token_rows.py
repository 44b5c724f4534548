"""Rows of token ids: their checksum, their lengths, which of them are left out. Knows no tokenizer and no model."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from .columns import batches, lengths_of, list_lengths


_TRUTHS = ("prompt_ids", "chosen_ids")


def dataset_checksum(dataset: Dataset, columns: Sequence[str] = _TRUTHS) -> str:
    """Checksum of token ids, by default the prompts' and ground truths', in their order: 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for batch in batches(dataset, columns):
        for name in columns:
            digest.update(lengths_of(batch[name]).astype(np.int64).tobytes())
            digest.update(pc.list_flatten(batch[name]).to_numpy().astype(np.int64).tobytes())
    return digest.hexdigest()


def drop_duplicates(dataset: Dataset) -> Dataset:
    """Keep the first of all rows with the same prompt and ground truth, in tokens."""
    digests = bytearray()  # 16 bytes for each row
    for batch in batches(dataset, _TRUTHS):
        for row in zip(*(batch[name].to_pylist() for name in _TRUTHS), strict=True):
            digests += hashlib.blake2b(repr(row).encode(), digest_size=16).digest()
    _, first = np.unique(np.frombuffer(digests, "S16"), return_index=True)
    return dataset.select(np.sort(first))


def percentile_length(dataset: Dataset, column: str, percentile: float) -> int:
    """The given percentile of the lengths, in tokens, of a column of token ids, rounded up."""
    return int(np.ceil(np.percentile(list_lengths(dataset, column), percentile)))


def drop_long_prompts(dataset: Dataset, max_length: int, source: str) -> Dataset:
    """Drop rows whose prompt leaves no room for a token in `max_length`, set by `source`. `ValueError` if all do."""
    lengths = list_lengths(dataset, "prompt_ids")
    if lengths.min() >= max_length:
        raise ValueError(
            f"All {len(dataset)} prompts are too long: the shortest has {lengths.min()} tokens, and {source} "
            f"({max_length} tokens) leaves room for at most {max_length - 1}. Raise that limit or shorten the prompts."
        )
    return dataset.select(np.flatnonzero(lengths < max_length))
