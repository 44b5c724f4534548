"""What every model is measured by: the task's score, negative log-likelihood and distinct-n."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .answers import answer, completion_ids, logps
from .task import Row, Task


_SAMPLING_SEED = 0  # so that models are compared on the same random numbers
MEASURES = ("score", "nll", "distinct_1", "distinct_2")


def measure(
    task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row]
) -> dict[str, float]:
    """
    Returns:
        `dict[str, float]`: `score`, the task's; `nll`, the negative log-likelihood of the ground truths in nats per
        token; `distinct_1` and `distinct_2` of answers sampled at temperature 1, one for each row.
    """
    model.eval()
    truths = [completion_ids(tokenizer, row["prompt"], row["completion"]) for row in rows]
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    longest = max(len(truth) for truth in truths)
    sampled = answer(model, tokenizer, [row["prompt"] for row in rows], longest + 4, _SAMPLING_SEED)
    return {
        "score": task.score(model, tokenizer, rows),
        "nll": -sum(logps(model, prompts, truths)) / sum(len(truth) for truth in truths),
        **distinct_n(sampled),
    }


def distinct_n(answers: list[list[int]]) -> dict[str, float]:
    """Different n-grams of the answers over all of them, for n of 1 and 2."""
    found = {}
    for n in (1, 2):
        grams = [tuple(ids[i : i + n]) for ids in answers for i in range(len(ids) - n + 1)]
        found[f"distinct_{n}"] = len(set(grams)) / max(1, len(grams))
    return found
