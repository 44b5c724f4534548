"""Bytes of the policy's numbers, in memory and on disk. Knows nothing of where they are written."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed

from ..run_directory.footprint import WeightSizes
from ..spin_config import SPINConfig


def weight_sizes(model: PreTrainedModel | PeftModel, merged: bool = False) -> WeightSizes:
    """
    Of a model that is loaded, or on the `meta` device; shared weights count once, 4-bit ones as the numbers they stand
    for. `merged`: whether its opponents are saved with the adapter merged.
    """
    trained = sum(_num_elements(p) * p.element_size() for p in model.parameters() if p.requires_grad)
    base = sum(_num_elements(p) for p in model.parameters() if not p.requires_grad) * model.dtype.itemsize
    saved = trained if getattr(model, "peft_config", None) else trained + base
    return WeightSizes(saved, trained, opponent=base if merged else saved, base=base)


def empty_policy(config: PretrainedConfig, args: SPINConfig, peft_config: PeftConfig | None) -> nn.Module:
    """The policy without its numbers: shapes and types alone, on the `meta` device."""
    dtype = (args.model_init_kwargs or {}).get("dtype") or "float32"  # DPOTrainer's default
    dtype = getattr(config, "dtype", None) or "float32" if dtype == "auto" else dtype
    with of_this_process_alone(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=args.trust_remote_code)
        model = model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        if peft_config is not None:
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


def _num_elements(parameter: nn.Parameter) -> int:
    quantized_shape = getattr(getattr(parameter, "quant_state", None), "shape", None)  # two of 4 bits in a byte
    return getattr(parameter, "ds_numel", parameter.numel()) if quantized_shape is None else quantized_shape.numel()
