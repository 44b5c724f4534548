"""What is trained of an adapter, and what the policy is without it. Knows nothing of servers and of publishing."""

from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model

from .published_form import adapter_config


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

# Initialisations of LoRA that leave the model as it was.
_NEUTRAL_INITIALISATIONS = (True, "gaussian", "orthogonal")
# Other types that do so, and the field of their configuration that says whether they were initialised thus.
_NEUTRAL_TYPES = {
    "ADALORA": "init_lora_weights",
    "BOFT": "init_weights",
    "DELORA": "init_weights",
    "GRALORA": "init_weights",
    "IA3": "init_ia3_weights",
    "LOHA": "init_weights",
    "LOKR": "init_weights",
    "MISS": "init_weights",
    "OFT": "init_weights",
    "RANDLORA": "init_weights",
    "VERA": "init_weights",
    "WAVEFT": "init_weights",
}


def describe_adapter(
    model: "str | PreTrainedModel | PeftModel", peft_config: "PeftConfig | None"
) -> dict[str, Any] | None:
    """The configuration of the adapter that is trained, in an order that does not change; `None` without one."""
    config = adapter_config(model, peft_config)
    if config is None:
        return None
    values = config.to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}


def check_trainable(model: "PreTrainedModel | PeftModel", peft_config: "PeftConfig | None") -> None:
    """
    Args:
        peft_config ([`~peft.PeftConfig`], *optional*): Of an adapter that is still to be added, and will be trained.

    Raises:
        `ValueError`: if no parameter of the model would be trained.
    """
    if peft_config is not None or any(parameter.requires_grad for parameter in model.parameters()):
        return
    if is_peft_model(model):
        remedy = (
            "An adapter is loaded frozen by default: load it with `PeftModel.from_pretrained(..., is_trainable=True)`."
        )
    else:
        remedy = "Pass a `peft_config` to train an adapter, or unfreeze the model with `model.requires_grad_(True)`."
    raise ValueError(
        f"All {len(list(model.parameters()))} parameters of `model` are frozen, but training needs some that are not: "
        f"nothing would be trained. {remedy}"
    )


def check_initial_reference(peft_config: "PeftConfig | None", setting: str) -> None:
    """
    Args:
        setting (`str`): What asks for the initial policy, see [`SPINConfig.initial_reference`].

    Raises:
        `ValueError`: if the initial policy could not be had back by switching this new adapter off.
    """
    without = "`opponent_reference='previous'`" if setting.startswith("opponent") else "`reference_mixture_alpha=0`"
    if getattr(peft_config, "bias", "none") not in ("none", False):
        raise ValueError(
            f"`{setting}` takes the initial policy's log-probs with the adapter switched off, but with "
            f"`bias={peft_config.bias!r}` the base model's own biases are trained, which that does not bring back. Use "
            f"`bias='none'`, or {without}."
        )
    if not starts_as_base(peft_config):
        field = "init_lora_weights" if hasattr(peft_config, "init_lora_weights") else "peft_type"
        remedy = "`init_lora_weights=True`" if field == "init_lora_weights" else "a `LoraConfig`"
        raise ValueError(
            f"`{setting}` takes the initial policy's log-probs with the adapter switched off, but with "
            f"`{field}={getattr(peft_config, field)!r}` the model is another one then. Use {remedy}, or {without}."
        )


def starts_as_base(peft_config: "PeftConfig | None") -> bool:
    """Whether a model with this new adapter (or none) still computes what the base model does, as far as is known."""
    if peft_config is None or peft_config.peft_type == "LN_TUNING":
        return True
    if peft_config.peft_type == "LORA":
        return peft_config.init_lora_weights in _NEUTRAL_INITIALISATIONS and not peft_config.layer_replication
    field = _NEUTRAL_TYPES.get(peft_config.peft_type.value)
    return field is not None and getattr(peft_config, field) is True


def complete_reference_adapter(model: "PeftModel") -> None:
    """
    Copy into the adapter "ref", DPOTrainer's copy of one that came trained, what DPOTrainer leaves out: the parameters
    whose names end in the adapter's, which are those of LoRA for embeddings and of most other types.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(".default"):
            model.get_parameter(f"{name.removesuffix('default')}ref").data.copy_(parameter.data)


def precisions_of(model: "PreTrainedModel | PeftModel") -> dict[str, torch.dtype]:
    """The precision of each parameter that is trained, by name."""
    return {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}


def restore_precisions(model: "PreTrainedModel | PeftModel", precisions: dict[str, torch.dtype]) -> None:
    """Undo that PEFT loads an adapter in another precision than it was trained in, as it does on a quantized model."""
    for name, parameter in model.named_parameters():
        if parameter.dtype != precisions.get(name, parameter.dtype):
            parameter.data = parameter.data.to(precisions[name])
