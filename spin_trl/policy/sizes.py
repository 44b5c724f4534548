"""Bytes of the policy's numbers, in memory and on disk. Knows nothing of where they are written."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.integrations import deepspeed

from ..run_directory.footprint import WeightSizes
from ..spin_config import SPINConfig


if TYPE_CHECKING:
    from peft import PeftConfig


def size_of_weights(model: nn.Module) -> int:
    """Bytes of what `save_model` writes of a model: of its adapter, or else of all weights, shared ones once."""
    is_adapter = bool(getattr(model, "peft_config", None))
    return _num_bytes(p for p in model.parameters() if p.requires_grad or not is_adapter)


def size_of_base(model: nn.Module) -> int:
    """Bytes of the model below an adapter, which are those of the model that the adapter is merged into."""
    return sum(_num_elements(p) for p in model.parameters() if not p.requires_grad) * _element_size(model)


def size_of_checkpoint(model: nn.Module, args: SPINConfig) -> int:
    """Bytes of a checkpoint: what `save_model` writes and, unless it is left out, two moments for what is trained."""
    moments = 0 if args.save_only_model else 2 * _num_bytes(p for p in model.parameters() if p.requires_grad)
    return size_of_weights(model) + moments


def weight_sizes(model: nn.Module, merged: bool = False) -> WeightSizes:
    """Of a model that is loaded, or on the `meta` device. `merged`: its opponents are published as full weights."""
    saved, base = size_of_weights(model), size_of_base(model)
    trained = _num_bytes(p for p in model.parameters() if p.requires_grad)
    return WeightSizes(saved, trained, opponent=base if merged else saved, base=base)


def empty_policy(config: PretrainedConfig, args: SPINConfig, peft_config: "PeftConfig | None") -> nn.Module:
    """The policy without its numbers: shapes and types alone, on the `meta` device."""
    dtype = (args.model_init_kwargs or {}).get("dtype") or "float32"  # DPOTrainer's default
    dtype = getattr(config, "dtype", None) or "float32" if dtype == "auto" else dtype
    with of_this_process_alone(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=args.trust_remote_code)
        model = model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        if peft_config is not None:
            from peft import get_peft_model

            peft_config = copy.deepcopy(peft_config)
            if hasattr(peft_config, "init_lora_weights"):
                peft_config.init_lora_weights = False  # others look at numbers that are not there
            model = get_peft_model(model, peft_config)
    return model


@contextmanager
def of_this_process_alone() -> Iterator[None]:
    """Under ZeRO-3 transformers spreads every model that is made over all processes, and waits for them to make it."""
    reference = deepspeed._hf_deepspeed_config_weak_ref
    config = None if reference is None else reference()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def _num_bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in parameters)


def _num_elements(parameter: nn.Parameter) -> int:
    quantized_shape = getattr(getattr(parameter, "quant_state", None), "shape", None)  # two of 4 bits in a byte
    return getattr(parameter, "ds_numel", parameter.numel()) if quantized_shape is None else quantized_shape.numel()


def _element_size(model: nn.Module) -> int:
    """Bytes of a number in the model's own precision."""
    dtype = getattr(model, "dtype", None) or next(model.parameters()).dtype
    return torch.empty(0, dtype=dtype).element_size()
