"""From log-probs to the loss of a run: the losses that DPOTrainer lacks, weighted and added. Knows no formula."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from accelerate import Accelerator

from .objective import LogProbs, objectives_of


class OwnLosses:
    """
    Of all losses of the run, and their weights, those that are ours, by the `values` of the configuration's fields.
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
        self._losses = [(loss, weight, {n: values[n] for n in loss.fields}) for loss, weight in losses if loss.is_own]
        self.accelerator = accelerator

    def __call__(self, logps: LogProbs, beta: float) -> torch.Tensor:
        """
        The loss, without dimensions, of this process's pairs; 0 where all losses are DPOTrainer's. Every process calls
        it together, with the iteration's `beta`, the paper's lambda.
        """
        loss = torch.zeros((), device=logps.chosen.device)
        for objective, weight, parameters in self._losses:
            seen = join_log_probs(logps, self.accelerator) if objective.is_of_batch else logps
            loss = loss + weight * objective.function(seen, beta, **parameters).mean()
        return loss


def join_log_probs(logps: LogProbs, accelerator: Accelerator) -> LogProbs:
    """
    Log-probs of the pairs of every process, as many on each, in the order of the processes.

    What a loss of them has by way of value is the same on every process. What it has by way of gradient, which flows
    into this process' own alone, is that of the one value once DDP, DeepSpeed or FSDP has averaged over the processes.
    """
    if accelerator.num_processes == 1:
        return logps

    def join(own: torch.Tensor) -> torch.Tensor:
        # Averaging divides by the number of processes what each contributes: to be undone here, in the gradient only.
        scaled = own.detach() + accelerator.num_processes * (own - own.detach())
        parts = list(accelerator.gather(own.detach()).chunk(accelerator.num_processes))
        parts[accelerator.process_index] = scaled
        return torch.cat(parts)

    given = {field.name: getattr(logps, field.name) for field in fields(logps)}
    return LogProbs(**{name: join(own) for name, own in given.items() if own is not None})
