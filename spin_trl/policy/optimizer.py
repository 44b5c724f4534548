"""An optimizer begun anew in each iteration: its learning rates and its moments. Knows nothing of pairs and models."""

from accelerate.logging import get_logger
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..spin_config import SPINConfig


logger = get_logger(__name__)

# They fill their state when they are constructed, or keep part of it elsewhere: emptying `state` would not reset them.
_CANNOT_RESET = ("adagrad", "adalomo", "schedule_free", "galore_adamw_layerwise", "onebit", "zeroone")


def check_schedule(args: SPINConfig, optimizer: Optimizer | None, scheduler: LRScheduler | None) -> None:
    """Raises `ValueError` if the learning rate or the moments could not begin anew in each iteration."""
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
    if not args.reset_optimizer or args.num_iterations == 1:
        return
    offload = deepspeed_config.get("zero_optimization", {}).get("offload_optimizer") or {}
    of_deepspeed = deepspeed_config.get("optimizer", {}).get("type")
    name = of_deepspeed or (args.optim.value if optimizer is None else type(optimizer).__name__)
    if offload.get("device") == "nvme":
        found = "DeepSpeed's offload of the optimizer to NVMe"
    elif not name.lower().startswith(_CANNOT_RESET):
        return
    elif of_deepspeed:
        found = f"the DeepSpeed optimizer {name!r}"
    else:
        found = f"`optim={name!r}`" if optimizer is None else f"the `{name}` passed in `optimizers`"
    raise ValueError(
        f"`reset_optimizer=True` is not possible with {found}: its moments cannot be emptied between iterations. "
        "Set `reset_optimizer=False` to carry them over, or choose another optimizer."
    )


def set_learning_rate(optimizer: Optimizer, rates: list[float]) -> None:
    """Set the learning rate of each parameter group, as if the optimizer had been created with it."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = group["initial_lr"] = rate
    defaults = getattr(getattr(optimizer, "optimizer", optimizer), "defaults", {})
    if "lr" in defaults:
        defaults["lr"] = rates[0]  # schedules with an absolute minimum compare it with this
