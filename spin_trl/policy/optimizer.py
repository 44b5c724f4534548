"""An optimizer begun anew in each iteration: its learning rates and its moments. Knows nothing of pairs and models."""

from typing import Any

from accelerate.logging import get_logger
from torch.optim import Adagrad, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..spin_config import SPINConfig


logger = get_logger(__name__)

# They fill their state when they are constructed, or keep part of it elsewhere: emptying `state` would not reset them.
_OPTIMIZERS_THAT_CANNOT_RESET = ("adagrad", "adalomo", "schedule_free", "galore_adamw_layerwise")
_DEEPSPEED_OPTIMIZERS_THAT_CANNOT_RESET = ("onebit", "zeroone")


def check_schedule(args: SPINConfig, optimizer: Optimizer | None, scheduler: LRScheduler | None) -> None:
    """
    Refuse what could not begin anew in each iteration, before a model is loaded.

    Args:
        optimizer, scheduler: What the user passed in `optimizers`.

    Raises:
        `ValueError`: if the learning rate or the moments are in other hands than the trainer's.
    """
    if scheduler is not None:
        if args.has_schedule("learning_rate"):
            raise ValueError(
                "`learning_rate` has a value for each iteration, but the scheduler passed in `optimizers` sets the "
                "learning rate. Pass `(optimizer, None)`, or a single `learning_rate`."
            )
        logger.warning(
            "The scheduler passed in `optimizers` runs once through all iterations: warm-up and decay do not restart "
            "in each of them. Pass `(optimizer, None)` if they should."
        )
    deepspeed_config = args.deepspeed_plugin.deepspeed_config if args.deepspeed_plugin is not None else {}
    if "scheduler" in deepspeed_config:
        raise ValueError(
            "The DeepSpeed configuration has a `scheduler`, which runs once through all iterations, but warm-up and "
            "decay restart in each. Remove the block; `lr_scheduler_type` and `warmup_steps` take its place."
        )
    if args.reset_optimizer and args.num_iterations > 1:
        if (found := _optimizer_that_cannot_reset(args, optimizer, deepspeed_config)) is not None:
            raise ValueError(
                f"`reset_optimizer=True` is not possible with {found}: its moments cannot be emptied between "
                "iterations. Set `reset_optimizer=False` to carry them over, or choose another optimizer."
            )


def _optimizer_that_cannot_reset(
    args: SPINConfig, optimizer: Optimizer | None, deepspeed_config: dict[str, Any]
) -> str | None:
    offload = deepspeed_config.get("zero_optimization", {}).get("offload_optimizer") or {}
    if offload.get("device") == "nvme":
        return "DeepSpeed's offload of the optimizer to NVMe"
    if of_deepspeed := deepspeed_config.get("optimizer", {}).get("type"):
        cannot = of_deepspeed.lower().startswith(_DEEPSPEED_OPTIMIZERS_THAT_CANNOT_RESET)
        return f"the DeepSpeed optimizer {of_deepspeed!r}" if cannot else None
    if optimizer is not None:
        return "the `torch.optim.Adagrad` passed in `optimizers`" if isinstance(optimizer, Adagrad) else None
    return f"`optim={args.optim.value!r}`" if args.optim.value.startswith(_OPTIMIZERS_THAT_CANNOT_RESET) else None


def set_learning_rate(optimizer: Optimizer, rates: list[float]) -> None:
    """Set the learning rate of each parameter group, as if the optimizer had been created with it."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = group["initial_lr"] = rate
    defaults = getattr(getattr(optimizer, "optimizer", optimizer), "defaults", {})
    if "lr" in defaults:
        defaults["lr"] = rates[0]  # schedules with an absolute minimum compare it with this


def forget_moments(optimizer: Optimizer) -> None:
    """Empty the optimizer's state, sharded or not; its next step creates it anew."""
    optimizer.state.clear()
