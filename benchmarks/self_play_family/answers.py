"""A model's answers to prompts, and its log-probs of given answers, in batches. Knows nothing of tasks."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


_BATCH_SIZE = 512


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int,
    sampling_seed: int | None = None,
) -> list[list[int]]:
    """
    Token ids of one answer to each prompt, up to and with the end token.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Pads on the left.
        sampling_seed (`int`, *optional*): Samples at temperature 1. By default the answers are greedy.
    """
    sampling = {"do_sample": False}
    if sampling_seed is not None:
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    answers = []
    with torch.random.fork_rng():
        torch.manual_seed(sampling_seed or 0)
        for start in range(0, len(prompts), _BATCH_SIZE):
            batch = tokenizer(prompts[start : start + _BATCH_SIZE], padding=True, return_tensors="pt")
            ids = model.generate(**batch, **sampling, max_new_tokens=max_new_tokens)
            answers += ids[:, batch["input_ids"].shape[1] :].tolist()
    return [_until_end(ids, tokenizer.eos_token_id) for ids in answers]


def answer_in_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int):
    """The greedy answers as text."""
    return tokenizer.batch_decode(answer(model, tokenizer, prompts, max_new_tokens), skip_special_tokens=True)


def _until_end(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids


def completion_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> list[int]:
    """Token ids of a completion behind its prompt, with the end token."""
    ids = tokenizer(prompt + completion)["input_ids"]
    return [*ids[len(tokenizer(prompt)["input_ids"]) :], tokenizer.eos_token_id]


@torch.no_grad()
def logps(model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]]) -> list[float]:
    """
    `log p(y|x)` of each completion, summed over its tokens, in nats.

    Args:
        prompts, completions (`list[list[int]]`): Token ids; a completion's end token is one of them.
    """
    found = []
    for start in range(0, len(prompts), _BATCH_SIZE):
        rows = list(zip(prompts[start : start + _BATCH_SIZE], completions[start : start + _BATCH_SIZE], strict=True))
        longest = max(len(prompt) + len(completion) for prompt, completion in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)  # (B, T), padded on the right, where nobody looks
        is_completion = torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, (prompt, completion) in enumerate(rows):
            end = len(prompt) + len(completion)
            ids[i, :end] = torch.tensor(prompt + completion)
            is_completion[i, len(prompt) : end] = True
        log_probs = model(input_ids=ids).logits[:, :-1].log_softmax(-1)  # (B, T - 1, V)
        of_tokens = log_probs.gather(-1, ids[:, 1:, None]).squeeze(-1)
        found += (of_tokens * is_completion[:, 1:]).double().sum(1).tolist()
    return found
