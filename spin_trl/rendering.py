"""Prompt and ground truth -> token ids, such that a sampler which repeats the ground truth gives the same ids.

Every prompt is rendered once, here. The sampler is sent these ids, and the ids that come back are trained on as they
are. Knows nothing of HTTP, models or paths.
"""

import json
from collections.abc import Collection
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .data import split_row


def tokenize_dataset(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, end_token_ids: Collection[int], num_proc: int | None = None
) -> Dataset:
    """
    Render every row of an SFT dataset into token ids.

    Args:
        dataset ([`~datasets.Dataset`]): Rows in one of the accepted formats (see `data.ACCEPTED_FORMATS`).
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): With a chat template if the rows are conversational.
        end_token_ids (`Collection[int]`): Token ids at which the model stops; the first is appended to plain text.
        num_proc (`int`, *optional*): Number of processes.

    Returns:
        [`~datasets.Dataset`] with the columns `row` (`int`, number in `dataset`), `prompt` (as it was), `prompt_ids`
        and `chosen_ids` (`list[int]`, ending in one end token).

    Raises:
        `ValueError`: naming the row, if it is malformed or its prompt is not a prefix of its conversation.
    """

    def tokenize_row(row: dict[str, Any], index: int) -> dict[str, Any]:
        prompt, completion = split_row(row, index)
        tools = row.get("tools")
        template_kwargs = {
            "tools": json.loads(tools) if isinstance(tools, str) else tools,
            **(row.get("chat_template_kwargs") or {}),
        }
        if isinstance(prompt, list):
            prompt_ids, chosen_ids = _render_messages(prompt, completion, tokenizer, index, template_kwargs)
        else:
            prompt_ids, chosen_ids = _render_text(prompt, completion, tokenizer)
        return {
            "row": index,
            "prompt": prompt,
            "prompt_ids": prompt_ids,
            "chosen_ids": end_after_first(chosen_ids, end_token_ids),
        }

    removed = [name for name in dataset.column_names if name != "prompt"]
    return dataset.map(
        tokenize_row, with_indices=True, remove_columns=removed, num_proc=num_proc, desc="Tokenizing prompts and truths"
    )


def end_after_first(completion_ids: list[int], end_token_ids: Collection[int]) -> list[int]:
    """
    Cut a ground truth after its first end token, or add one: a sampler emits exactly one, and nothing after it.

    Most chat templates write something behind the end token (a newline in Qwen's and Gemma's). Left there, the policy
    would learn to tell ground truth from generation by punctuation.
    """
    for position, token_id in enumerate(completion_ids):
        if token_id in end_token_ids:
            return completion_ids[: position + 1]
    return completion_ids + [next(iter(end_token_ids))]


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


def _render_text(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    prompt_ids = tokenizer(prompt)["input_ids"]
    # Some tokenizers end every text with their end token; nothing can follow it.
    while prompt_ids and prompt_ids[-1] == tokenizer.eos_token_id:
        prompt_ids = prompt_ids[:-1]
    full_ids = tokenizer(prompt + completion)["input_ids"]
    if full_ids[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, full_ids[len(prompt_ids) :]
    # Tokens merge across the boundary. The sampler goes on from the prompt's own tokens, so must the ground truth.
    return prompt_ids, tokenizer(completion, add_special_tokens=False)["input_ids"]


def _render_messages(
    prompt: list[dict],
    completion: list[dict],
    tokenizer: PreTrainedTokenizerBase,
    index: int,
    template_kwargs: dict[str, Any],
) -> tuple[list[int], list[int]]:
    def render(messages: list[dict], add_generation_prompt: bool) -> list[int]:
        return tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, add_generation_prompt=add_generation_prompt, **template_kwargs
        )["input_ids"]

    prompt_ids = render(prompt, True)
    full_ids = render(prompt + completion, False)
    if full_ids[: len(prompt_ids)] != prompt_ids:
        common = next(i for i, ids in enumerate(zip(prompt_ids, full_ids + [None], strict=False)) if ids[0] != ids[1])
        raise ValueError(
            f"Row {index}: the chat template renders the prompt differently from the beginning of the whole "
            f"conversation. Alone it ends in {tokenizer.decode(prompt_ids[common:])!r}, the conversation goes on with "
            f"{tokenizer.decode(full_ids[common : common + 8])!r}. The policy would be trained on a context that the "
            "opponent never saw. Set a `chat_template_kwargs` column that makes the two agree (for example "
            "{'enable_thinking': False}), or use another chat template."
        )
    return prompt_ids, full_ids[len(prompt_ids) :]
