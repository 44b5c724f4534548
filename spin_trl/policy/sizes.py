"""Bytes of the policy's numbers, in memory and on disk. Knows nothing of where they are written."""

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..run_directory.footprint import WeightSizes


def weight_sizes(model: PreTrainedModel | PeftModel, merged: bool = False) -> WeightSizes:
    """
    Of a model: shared weights count once, 4-bit ones as the numbers they stand for. `merged`: whether its opponents are
    saved with the adapter merged.
    """
    trained = sum(_num_elements(p) * p.element_size() for p in model.parameters() if p.requires_grad)
    base = sum(_num_elements(p) for p in model.parameters() if not p.requires_grad) * model.dtype.itemsize
    saved = trained if getattr(model, "peft_config", None) else trained + base
    return WeightSizes(saved, trained, opponent=base if merged else saved, base=base)


def _num_elements(parameter: nn.Parameter) -> int:
    quantized_shape = getattr(getattr(parameter, "quant_state", None), "shape", None)  # two of 4 bits in a byte
    return getattr(parameter, "ds_numel", parameter.numel()) if quantized_shape is None else quantized_shape.numel()
