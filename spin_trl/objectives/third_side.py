"""A third side for batches of pairs: `initial_ids`, the initial policy's answer, in the same forward pass as the rest.

DPOTrainer is shown the two sides that it knows, so that all it computes and logs is of these. Knows nothing of losses.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch


INITIAL_IDS = "initial_ids"
_BATCH_KEY = "initial"
_SEQUENCES = ("input_ids", "attention_mask", "completion_mask")


class InitialSideCollator:
    """
    A data collator that, where pairs have `initial_ids`, adds prompt and initial answer to the batch as `initial`: a
    `dict` of `input_ids`, `attention_mask` and `labels`, each of shape `(B, T)`. They are truncated as the other sides
    are, and all three are padded to the same length.

    Args:
        collator (`Callable`): Makes a batch of two sides, such as [`~trl.trainer.DataCollatorForPreference`].
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if INITIAL_IDS not in examples[0]:
            return self.collator(examples)
        pairs = [{name: value for name, value in row.items() if name != INITIAL_IDS} for row in examples]
        # As the chosen side of further pairs, so that whatever happens to the other sides happens to it too.
        further = [{**pair, "chosen_ids": row[INITIAL_IDS]} for pair, row in zip(pairs, examples, strict=True)]
        batch = self.collator(pairs + further)
        count = len(examples)
        own = {name: value[:count] for name, value in batch.items() if name not in _SEQUENCES}
        own |= {name: torch.cat([batch[name][:count], batch[name][2 * count : 3 * count]]) for name in _SEQUENCES}
        ids, attention_mask, completion_mask = (batch[name][count : 2 * count] for name in _SEQUENCES)
        labels = ids.masked_fill(completion_mask == 0, -100)
        own[_BATCH_KEY] = {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}
        return own


def take_initial(batch: dict[str, Any]) -> dict[str, torch.Tensor] | None:
    """Take the third side out of a batch: DPOTrainer would hand it to the model as it is."""
    return batch.pop(_BATCH_KEY, None)


def join_initial(inputs: dict[str, Any], initial: dict[str, torch.Tensor] | None) -> dict[str, Any]:
    """What the model is given: the two sides, of shape `(2 * B, T)`, with the third below them."""
    if initial is None:
        return inputs
    return {**inputs, **{name: torch.cat([inputs[name], initial[name]]) for name in initial}}


def without_initial(outputs: Any, num_rows: int) -> Any:
    """The model's outputs for the first `num_rows` sequences, which are the two sides."""
    first = {name: value[:num_rows] if _has_rows(value) else value for name, value in vars(outputs).items()}
    return SimpleNamespace(**first)


def _has_rows(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0
