"""The user's datasets -> what the run plays on: rendered, without invalid rows and duplicates, and a report of both.

Knows nothing of models, servers and paths.
"""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .data import detect_format
from .rendering import tokenize_dataset
from .spin_config import SPINConfig


logger = get_logger(__name__)


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


def dataset_checksum(dataset: Dataset) -> str:
    """Checksum of the prompts and ground truths, token by token, in their order: 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for batch in dataset.select_columns(["prompt_ids", "chosen_ids"]).with_format("arrow").iter(batch_size=1000):
        for name in ("prompt_ids", "chosen_ids"):
            lists = batch[name].combine_chunks()
            digest.update(lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
            digest.update(lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
    return digest.hexdigest()


def drop_duplicates(dataset: Dataset) -> tuple[Dataset, int]:
    """Keep the first of all rows with the same prompt and ground truth, in tokens; and how many were dropped."""
    seen, kept = set(), []
    for i, row in enumerate(dataset.select_columns(["prompt_ids", "chosen_ids"])):
        key = hashlib.blake2b(repr((row["prompt_ids"], row["chosen_ids"])).encode(), digest_size=16).digest()
        if key not in seen:
            seen.add(key)
            kept.append(i)
    num_dropped = len(dataset) - len(kept)
    return (dataset.select(kept) if num_dropped else dataset), num_dropped


def percentile_length(dataset: Dataset, column: str, percentile: float) -> int:
    """The given percentile of the lengths, in tokens, of a column of token ids, rounded up."""
    lengths = [len(ids) for batch in dataset.select_columns(column).iter(1024) for ids in batch[column]]
    return int(np.ceil(np.percentile(lengths, percentile)))


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
    kept = dataset.filter(
        lambda lengths: [len(ids) <= max_prompt_length for ids in lengths],
        input_columns="prompt_ids",
        batched=True,
        desc="Dropping prompts that are too long",
    )
    if len(kept) == 0:
        shortest = min(len(row["prompt_ids"]) for row in dataset.select_columns("prompt_ids"))
        raise ValueError(
            f"All {len(dataset)} prompts are too long: the shortest has {shortest} tokens, and {reason} leaves room "
            f"for at most {max_prompt_length}. Raise that limit or shorten the prompts."
        )
    return kept, len(dataset) - len(kept)
