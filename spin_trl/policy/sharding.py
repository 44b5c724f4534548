"""Models whose weights are spread over the processes: the policy made whole to generate with, and the initial model
loaded beside it for a while. Knows nothing of pairs and iterations. Every process must enter these contexts together.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model, parse_flag_from_env, release_memory
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from trl.models import unwrap_model_for_generation
from trl.models.utils import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import add_fused_lm_head, create_model_from_path

from ..spin_config import SPINConfig


@dataclass(frozen=True)
class Sharding:
    """What spreads the training over the processes, if anything, and how far: the ZeRO stage, or FSDP's version."""

    engine: Literal["deepspeed", "fsdp"] | None = None
    level: int = 0

    def __str__(self) -> str:
        return "FSDP" if self.engine == "fsdp" else f"DeepSpeed ZeRO-{self.level}"

    @property
    def spreads_weights(self) -> bool:
        """Whether each process holds shards of the weights, instead of all of them."""
        return self.engine == "fsdp" or self.level == 3

    @classmethod
    def of(cls, args: SPINConfig) -> "Sharding":
        """As the arguments or the launcher say. Needs no accelerator yet."""
        if args.deepspeed_plugin is not None:
            return cls("deepspeed", args.deepspeed_plugin.zero_stage)
        if args.fsdp_plugin_args is not None:
            return cls("fsdp", args.fsdp_plugin_args["fsdp_version"])
        if parse_flag_from_env("ACCELERATE_USE_FSDP"):
            return cls("fsdp", int(os.environ.get("FSDP_VERSION", "1")))
        return cls()


def check_can_generate(sharding: Sharding) -> None:
    """Raises `ValueError` if the policy will be sharded such that it cannot generate in-process."""
    if sharding == Sharding("fsdp", 1):
        raise ValueError(
            "In-process generation is not possible with version 1 of FSDP, where every process would have to generate "
            "in lockstep. Use `fsdp_version: 2` (see recipes/accelerate/fsdp2.yaml), or a vLLM server."
        )


@contextmanager
def whole_model(
    wrapped: nn.Module, accelerator: Accelerator, gradient_checkpointing_kwargs: dict[str, Any] | None
) -> Iterator[PreTrainedModel]:
    """
    A model in training, unwrapped, with all its weights on every process. Inside, processes may generate different
    numbers of batches: no forward pass communicates.
    """
    with unwrap_model_for_generation(
        wrapped, accelerator, gradient_checkpointing_kwargs=gradient_checkpointing_kwargs
    ) as model:
        shards = [module for module in model.modules() if isinstance(module, FSDPModule)]  # of version 2
        for module in shards:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield model
        finally:
            for module in shards:
                module.reshard()
                # The root's weights are needed again at once.
                reshards = module is not model and accelerator.state.fsdp_plugin.reshard_after_forward
                module.set_reshard_after_forward(reshards, recurse=False)


@contextmanager
def initial_model(
    path: str, policy: PreTrainedModel, args: SPINConfig, accelerator: Accelerator
) -> Iterator[nn.Module]:
    """A model as it was before training, to score with, sharded as the policy is that it became; freed at the end."""
    in_run_directory = Path(path).absolute().is_relative_to(Path(args.output_dir).absolute())
    init_kwargs = {
        "trust_remote_code": args.trust_remote_code,
        "dtype": policy.dtype,
        "attn_implementation": policy.config._attn_implementation,
        **(args.model_init_kwargs or {}),
        "device_map": None,
        # A run writes safetensors only: a pickle in its directory is somebody else's, and may run code.
        **({"use_safetensors": True} if in_run_directory else {}),
    }
    model = create_model_from_path(path, **init_kwargs).eval()
    add_fused_lm_head(model)
    sharding = Sharding.of(args)
    if not sharding.spreads_weights:
        model = model.to(accelerator.device)
    elif sharding.engine == "deepspeed":
        model = prepare_deepspeed(model, accelerator)
    elif sharding.level == 2:  # TRL's `prepare_fsdp` shards what each rank has loaded, which here only rank 0 has
        model = fsdp2_prepare_model(accelerator, model)
    else:
        model = prepare_fsdp(model, accelerator)
    try:
        yield model
    finally:
        if hasattr(model, "destroy"):  # a DeepSpeed engine
            model.destroy()
        model = None
        release_memory()
