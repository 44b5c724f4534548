"""The user's datasets -> what the run plays on: rendered, without invalid rows and duplicates, and a report of both.

Knows nothing of models, servers and paths.
"""

import hashlib
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from accelerate.logging import get_logger
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..spin_config import SPINConfig
from .columns import batches, joined, lengths_of, list_lengths
from .formats import detect_format
from .rendering import TokenizedData, tokenize_dataset


logger = get_logger(__name__)

_TOKEN_COLUMNS = ("prompt_ids", "chosen_ids")


class PreparedData(NamedTuple):
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
    invalid_rows: list[dict[str, Any]]


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
    columns = {"prompt_column": args.prompt_column, "completion_column": args.completion_column}
    prepared, invalid_rows = {}, []
    for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
        if dataset is not None:
            rendered = render(
                args, tokenizer, end_token_ids, dataset, f"In `{name}`.", train_on_turns=args.train_on_turns, **columns
            )
            prepared[name] = rendered.dataset
            invalid_rows += [{"dataset": name, "row": row, "reason": why} for row, why in rendered.invalid_rows]
    train, num_duplicates = drop_duplicates(prepared["train_dataset"])
    if num_duplicates:
        logger.warning(f"Dropped {num_duplicates} row(s) of `train_dataset` that repeat an earlier one.")
    if invalid_rows:
        logger.warning(
            f"Left out {len(invalid_rows)} invalid row(s), listed in `invalid_rows.jsonl` of the run directory. The "
            f"first: row {invalid_rows[0]['row']} of `{invalid_rows[0]['dataset']}`, {invalid_rows[0]['reason']}"
        )
    report = {
        "format": detect_format(train_dataset.column_names, **columns).name,
        "num_source_rows": len(train_dataset),
        "num_invalid_rows": len(invalid_rows),
        "num_duplicate_rows": num_duplicates,
    }
    return PreparedData(train, prepared.get("eval_dataset"), report, invalid_rows)


def render(
    args: SPINConfig,
    tokenizer: PreTrainedTokenizerBase,
    end_token_ids: Collection[int],
    dataset: Dataset,
    note: str,
    **layout: Any,
) -> TokenizedData:
    """As [`rendering.tokenize_dataset`], with the run's settings. An error carries the note, which says of what."""
    try:
        return tokenize_dataset(
            dataset,
            tokenizer,
            end_token_ids,
            chat_template_kwargs=args.chat_template_kwargs,
            skip_invalid_rows=args.skip_invalid_rows,
            num_proc=args.dataset_num_proc,
            **layout,
        )
    except ValueError as error:
        error.add_note(note)
        raise


def dataset_checksum(dataset: Dataset, columns: Sequence[str] = _TOKEN_COLUMNS) -> str:
    """Checksum of token ids, by default the prompts' and ground truths', in their order: 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for batch in batches(dataset, columns):
        for name in columns:
            digest.update(lengths_of(batch[name]).astype(np.int64).tobytes())
            digest.update(_tokens(batch[name]).tobytes())
    return digest.hexdigest()


def drop_duplicates(dataset: Dataset) -> tuple[Dataset, int]:
    """Keep the first of all rows with the same prompt and ground truth, in tokens; and how many were dropped."""
    digests = joined(_row_digests(batch) for batch in batches(dataset, _TOKEN_COLUMNS))
    _, first = np.unique(digests, return_index=True)
    return _select(dataset, np.sort(first))


def _row_digests(batch: pa.Table) -> np.ndarray:
    """Sixteen bytes for each row, as two numbers."""
    sides = [np.split(_tokens(batch[name]), np.cumsum(lengths_of(batch[name]))[:-1]) for name in _TOKEN_COLUMNS]
    digests = bytearray()
    for prompt, truth in zip(*sides, strict=True):
        content = len(prompt).to_bytes(8, "little") + prompt.tobytes() + truth.tobytes()
        digests += hashlib.blake2b(content, digest_size=16).digest()
    return np.frombuffer(digests, dtype=[("first", np.uint64), ("second", np.uint64)])


def _tokens(lists: pa.ChunkedArray) -> np.ndarray:
    return lists.combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.int64)


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
    return _select(dataset, kept)


def _select(dataset: Dataset, kept: np.ndarray) -> tuple[Dataset, int]:
    num_dropped = len(dataset) - len(kept)
    return (dataset.select(kept) if num_dropped else dataset), num_dropped
