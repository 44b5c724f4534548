"""From log-probs to the loss of a run: the losses that DPOTrainer lacks, weighted and added. Knows no formula."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from .gather import join_log_probs
from .objective import LogProbs, objectives_of


class OwnLosses:
    """
    Args:
        loss_types (`Sequence[str]`), loss_weights (`Sequence[float]`): Of the run, DPOTrainer's own among them.
        values (`Mapping[str, Any]`): Of the configuration's fields.
        accelerator (`Accelerator`): Of the run.

    `trl_loss_types` and `trl_loss_weights` are what is left to DPOTrainer.
    """

    def __init__(
        self,
        loss_types: Sequence[str],
        loss_weights: Sequence[float],
        values: Mapping[str, Any],
        accelerator: Accelerator,
    ):
        losses = list(zip(objectives_of(loss_types), loss_weights, strict=True))
        self.trl_loss_types = [loss.name for loss, _ in losses if not loss.is_own]
        self.trl_loss_weights = [weight for loss, weight in losses if not loss.is_own]
        self._losses = [(loss, weight) for loss, weight in losses if loss.is_own]
        self._fields = {loss.name: {name: values[name] for name in loss.fields} for loss, _ in self._losses}
        self.accelerator = accelerator

    def __call__(self, logps: LogProbs, beta: float) -> torch.Tensor:
        """
        Args:
            logps ([`LogProbs`]): Of the pairs of this process. Every process calls it together.
            beta (`float`): The iteration's, the paper's lambda.

        Returns:
            `torch.Tensor` without dimensions; 0 where all losses are DPOTrainer's.
        """
        loss = torch.zeros((), device=logps.chosen.device)
        for objective, weight in self._losses:
            seen = join_log_probs(logps, self.accelerator) if objective.is_of_batch else logps
            loss = loss + weight * objective.function(seen, beta, **self._fields[objective.name]).mean()
        return loss
