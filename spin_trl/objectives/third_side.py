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
    A data collator that, where pairs have `initial_ids`, adds prompt and initial answer to the batch that `collator`
    makes of two sides, as `initial`: a `dict` of `input_ids`, `attention_mask` and `labels`, each of shape `(B, T)`.
    They are truncated as the other sides are, and all three are padded to the same length.
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


class ForwardOfSides:
    """
    A model as DPOTrainer calls it, which keeps the log-probs of the forward pass that computes the loss, and puts into
    it the third side, taken out of the collator's batch: no model knows it.
    """

    def __init__(self, model: Callable[..., Any], batch: dict[str, Any]):
        self.model = model
        self.initial: dict[str, torch.Tensor] | None = batch.pop(_BATCH_KEY, None)
        self.num_tokens = batch["completion_mask"].size(1) - 1
        self.log_probs: torch.Tensor | None = None

    def __call__(self, **kwargs) -> Any:
        if not kwargs.get("fused_lm_head"):  # the logits that `compute_metrics` asks for
            return self.model(**kwargs)
        num_rows = len(kwargs["input_ids"])
        if self.initial is not None:
            kwargs |= {name: torch.cat([kwargs[name], ids]) for name, ids in self.initial.items()}
        outputs = self.model(**kwargs)
        self.log_probs = outputs.log_probs
        if self.initial is None:
            return outputs
        has_rows = {name: isinstance(value, torch.Tensor) and value.dim() > 0 for name, value in vars(outputs).items()}
        return SimpleNamespace(**{k: v[:num_rows] if has_rows[k] else v for k, v in vars(outputs).items()})

    def sides(self) -> dict[str, torch.Tensor]:
        """Log-probs of `chosen`, `rejected` and, where there is a third side, `initial`, of shape `(B,)` each."""
        names = ("chosen", "rejected") if self.initial is None else ("chosen", "rejected", "initial")
        # Prompt-learning PEFT puts virtual tokens before the real ones.
        logps = self.log_probs[:, -self.num_tokens :].sum(dim=1)
        return dict(zip(names, logps.chunk(len(names)), strict=True))
