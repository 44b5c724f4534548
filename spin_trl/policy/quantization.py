"""Is the policy's base model quantized, what does a server play then, and what does bitsandbytes need for training?

Knows nothing of servers.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from ..spin_config import SPINConfig


@dataclass(frozen=True)
class Quantization:
    """How the base model is quantized: the configuration, with transformers' name of the method."""

    settings: dict[str, Any]
    method: str
    of_checkpoint: bool  # the checkpoint is quantized itself, so that a server loads the same numbers

    @property
    def is_4bit(self) -> bool:
        """Whether it is bitsandbytes with 4 bits: a model of the numbers that these stand for computes the same."""
        return bool(self.settings.get("load_in_4bit") or self.settings.get("_load_in_4bit"))


def find_quantization(
    model: str | PreTrainedModel | PeftModel,
    args: SPINConfig,
    quantization_config: BitsAndBytesConfig | dict[str, Any] | None,
    model_config: PretrainedConfig,
) -> Quantization | None:
    """
    `None` if it is not, going by what was passed and by the model's own configuration.

    Raises:
        `ValueError`: if it needs a package that is not installed.
    """
    asked = quantization_config or (args.model_init_kwargs or {}).get("quantization_config")
    found = getattr(model_config, "quantization_config", None)
    settings = asked or found
    if settings is not None and not isinstance(settings, dict):
        settings = settings.to_dict()
    if settings is None or settings.get("dequantize"):  # as it is loaded
        return None
    method = settings.get("quant_method") or "bitsandbytes"  # as transformers completes it
    if method == "bitsandbytes" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "The model is to be quantized by bitsandbytes, which is not installed: `pip install spin_trl[qlora]`."
        )
    quantizer = getattr(model, "hf_quantizer", None)
    of_checkpoint = found is not None if quantizer is None else quantizer.pre_quantized
    return Quantization(settings, method, of_checkpoint)


def check_trains_adapter(quantization: Quantization | None, has_adapter: bool) -> None:
    """Raises `ValueError` if the quantized weights themselves would be trained."""
    if quantization is not None and quantization.method == "bitsandbytes" and not has_adapter:
        raise ValueError(
            "The model is quantized by bitsandbytes, and quantized weights cannot be trained. Train an adapter: pass a "
            "`peft_config` (with recipes/spin.py `use_peft: true`), or leave the quantization out."
        )


def keep_weights_as_quantized(model: nn.Module) -> None:
    """
    Keep bitsandbytes from packing 4-bit weights for inference, as it does on some CPUs in the first forward pass in
    evaluation mode: gradients silently stop at packed weights, for good.

    Raises:
        `ValueError`: if it has done so already.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                raise ValueError(
                    "bitsandbytes has packed the model's 4-bit weights, because it was run in evaluation mode: no "
                    "gradient would pass them. Load the model anew, and pass it before it is run."
                )
