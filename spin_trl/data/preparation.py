"""The user's datasets -> what the run plays on: rendered, without invalid rows and duplicates, and a report of both.

Knows nothing of models, servers and paths.
"""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from accelerate.logging import get_logger
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..spin_config import SPINConfig
from .columns import batches, list_lengths
from .formats import detect_format
from .rendering import tokenize_dataset


logger = get_logger(__name__)

_TOKEN_COLUMNS = ("prompt_ids", "chosen_ids")


@dataclass
class PreparedData:
    """
    What the run plays on.

    Args:
        train, eval ([`~datasets.Dataset`]): Token ids, see [`rendering.TokenizedData`].
        report (`dict[str, Any]`): Format and row counts, for `self_play.json`.
        invalid_rows (`list[dict]`): Dataset, row number and reason of every row left out.
    """

    train: Dataset
    eval: Dataset | None
    report: dict[str, Any]
    invalid_rows: list[dict[str, Any]] = field(default_factory=list)


def prepare_data(
    args: SPINConfig,
    tokenizer: PreTrainedTokenizerBase,
    end_token_ids: Collection[int],
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
) -> PreparedData:
    """
    Render both datasets. Duplicates are dropped from the training data alone: every evaluation row counts.

    Raises:
        `ValueError`: see [`rendering.tokenize_dataset`]; the message names the dataset.
    """
    invalid_rows = []

    def prepare(dataset: Dataset, name: str) -> Dataset:
        try:
            tokenized = tokenize_dataset(
                dataset,
                tokenizer,
                end_token_ids,
                prompt_column=args.prompt_column,
                completion_column=args.completion_column,
                train_on_turns=args.train_on_turns,
                chat_template_kwargs=args.chat_template_kwargs,
                skip_invalid_rows=args.skip_invalid_rows,
                num_proc=args.dataset_num_proc,
            )
        except ValueError as error:
            error.add_note(f"In `{name}`.")
            raise
        invalid_rows.extend({"dataset": name, "row": row, "reason": reason} for row, reason in tokenized.invalid_rows)
        return tokenized.dataset

    train = prepare(train_dataset, "train_dataset")
    train, num_duplicates = drop_duplicates(train)
    evaluation = None if eval_dataset is None else prepare(eval_dataset, "eval_dataset")
    if num_duplicates:
        logger.warning(f"Dropped {num_duplicates} row(s) of `train_dataset` that repeat an earlier one.")
    if invalid_rows:
        logger.warning(
            f"Left out {len(invalid_rows)} invalid row(s), listed in `invalid_rows.jsonl` of the run directory. The "
            f"first: row {invalid_rows[0]['row']} of `{invalid_rows[0]['dataset']}`, {invalid_rows[0]['reason']}"
        )
    report = {
        "format": detect_format(train_dataset.column_names, args.prompt_column, args.completion_column).name,
        "num_source_rows": len(train_dataset),
        "num_invalid_rows": len(invalid_rows),
        "num_duplicate_rows": num_duplicates,
    }
    return PreparedData(train, evaluation, report, invalid_rows)


def dataset_checksum(dataset: Dataset, columns: Sequence[str] = _TOKEN_COLUMNS) -> str:
    """Checksum of token ids, by default the prompts' and ground truths', in their order: 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for batch in batches(dataset, columns):
        for name in columns:
            lists = batch[name].combine_chunks()
            digest.update(lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
            digest.update(lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
    return digest.hexdigest()


def drop_duplicates(dataset: Dataset) -> tuple[Dataset, int]:
    """Keep the first of all rows with the same prompt and ground truth, in tokens; and how many were dropped."""
    digests = np.concatenate([_row_digests(batch) for batch in batches(dataset, _TOKEN_COLUMNS)])
    _, first = np.unique(digests, return_index=True)
    num_dropped = len(dataset) - len(first)
    return (dataset.select(np.sort(first)) if num_dropped else dataset), num_dropped


def _row_digests(batch: pa.Table) -> np.ndarray:
    """Sixteen bytes for each row, as two numbers."""
    lists = [batch[name].combine_chunks() for name in _TOKEN_COLUMNS]
    values = [column.flatten().to_numpy(zero_copy_only=False).astype(np.int64) for column in lists]
    ends = [np.cumsum(column.value_lengths().to_numpy(zero_copy_only=False)) for column in lists]
    digests = bytearray()
    starts = [0, 0]
    for stops in zip(*ends, strict=True):
        prompt, truth = (ids[start:stop] for ids, start, stop in zip(values, starts, stops, strict=True))
        content = len(prompt).to_bytes(8, "little") + prompt.tobytes() + truth.tobytes()
        digests += hashlib.blake2b(content, digest_size=16).digest()
        starts = stops
    return np.frombuffer(digests, dtype=[("first", np.uint64), ("second", np.uint64)])


def percentile_length(dataset: Dataset, column: str, percentile: float) -> int:
    """The given percentile of the lengths, in tokens, of a column of token ids, rounded up."""
    return int(np.ceil(np.percentile(list_lengths(dataset, column), percentile)))


def drop_long_prompts(dataset: Dataset, max_prompt_length: int, reason: str) -> tuple[Dataset, int]:
    """
    Drop the rows whose prompt is longer than the context allows, before anything is generated.

    Args:
        dataset ([`~datasets.Dataset`]): With a `prompt_ids` column.
        max_prompt_length (`int`): Longest prompt that leaves room for an answer, in tokens.
        reason (`str`): Where the limit comes from, for the error.

    Returns:
        The remaining dataset and the number of dropped rows.

    Raises:
        `ValueError`: if no row is left.
    """
    lengths = list_lengths(dataset, "prompt_ids")
    kept = np.flatnonzero(lengths <= max_prompt_length)
    if len(kept) == 0:
        raise ValueError(
            f"All {len(dataset)} prompts are too long: the shortest has {lengths.min()} tokens, and {reason} leaves "
            f"room for at most {max_prompt_length}. Raise that limit or shorten the prompts."
        )
    num_dropped = len(dataset) - len(kept)
    return (dataset.select(kept) if num_dropped else dataset), num_dropped
