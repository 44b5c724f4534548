"""A batch's numbers joined over all processes, such that a loss of them all has its own gradient. Knows no losses."""

from dataclasses import fields, replace

import torch
from accelerate import Accelerator

from .objective import LogProbs


def join_log_probs(logps: LogProbs, accelerator: Accelerator) -> LogProbs:
    """
    Log-probs of the pairs of every process, in the order of the processes. Every process calls it together.

    What a loss of them has by way of value is the same on every process. What it has by way of gradient is, once DDP,
    DeepSpeed or FSDP has averaged the gradients over the processes, the gradient of that one value.

    Args:
        logps ([`LogProbs`]): Of the `B` pairs of this process; as many on each.
        accelerator (`Accelerator`): Of the run.

    Returns:
        [`LogProbs`] of `B` times the number of processes pairs. Gradients flow into this process' own alone.
    """
    if accelerator.num_processes == 1:
        return logps
    given = {field.name: getattr(logps, field.name) for field in fields(logps)}
    return replace(logps, **{name: _join(own, accelerator) for name, own in given.items() if own is not None})


def _join(own: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    # Averaging divides by the number of processes what each contributes: to be undone here, in the gradient only.
    scaled = own.detach() + accelerator.num_processes * (own - own.detach())
    parts = list(accelerator.gather(own.detach()).chunk(accelerator.num_processes))
    parts[accelerator.process_index] = scaled
    return torch.cat(parts)
