"""What is trained of an adapter, and what the policy is without it. Knows nothing of servers and of publishing."""

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel


logger = get_logger(__name__)

_NEUTRAL_INITIALISATIONS = (True, "gaussian", "orthogonal")  # of LoRA: they leave the model as it was
_INITIALISATION_FIELDS = ("init_weights", "init_lora_weights", "init_ia3_weights")


def adapter_config(model: str | PreTrainedModel | PeftModel, peft_config: PeftConfig | None) -> PeftConfig | None:
    """
    The configuration of the adapter that is trained, whether it is new or the model brings it. Raises `ValueError` if
    the model's active adapter is not "default", which DPOTrainer trains and saves.
    """
    if peft_config is not None or isinstance(model, str) or not is_peft_model(model):
        return peft_config
    names, active = list(model.peft_config), list(model.active_adapters)
    if active != ["default"]:
        raise ValueError(
            f"Of the model's adapters {names}, {active} are active, but the one that is trained and published must be "
            "'default'. Call `model.set_adapter('default')`, or load it with "
            "`PeftModel.from_pretrained(..., adapter_name='default')`."
        )
    return model.peft_config["default"]


def check_trainable(model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None) -> None:
    """Raises `ValueError` if no parameter of the model would be trained, and no adapter is to be added."""
    if peft_config is not None or any(parameter.requires_grad for parameter in model.parameters()):
        return
    remedy = "Pass a `peft_config` to train an adapter, or unfreeze the model with `model.requires_grad_(True)`."
    if is_peft_model(model):
        remedy = "Load the adapter with `PeftModel.from_pretrained(..., is_trainable=True)`: by default it is frozen."
    raise ValueError(
        f"All {len(list(model.parameters()))} parameters of `model` are frozen, but training needs some that are not. "
        f"{remedy}"
    )


def warn_of_half_precision(model: PreTrainedModel | PeftModel) -> None:
    """Tell that steps are lost in rounding, where a parameter of 16 bits is trained as it is."""
    halves = {str(kind) for kind in precisions_of(model).values() if kind in (torch.bfloat16, torch.float16)}
    if halves:
        logger.warning(
            f"The trained weights are {' and '.join(sorted(halves))}, in which the small steps of fine-tuning round to "
            "nothing: the policy will hardly learn. Load the model with `dtype='float32'`; `bf16=True` still computes "
            "in half precision."
        )


def check_initial_reference(peft_config: PeftConfig | None, alpha: float) -> None:
    """
    Raises `ValueError` if the initial policy could not be had back by switching this new adapter off, but is part of
    the reference: `alpha` of it.
    """
    trains_base = getattr(peft_config, "bias", "none") not in ("none", False)
    if not trains_base and starts_as_base(peft_config):
        return
    field = "bias" if trains_base else "init_lora_weights" if hasattr(peft_config, "init_lora_weights") else "peft_type"
    raise ValueError(
        f"`reference_mixture_alpha={alpha:g}` takes the initial policy's log-probs with the adapter switched off, but "
        f"with `{field}={getattr(peft_config, field)!r}` that does not bring back the initial policy. Use a plain "
        "`LoraConfig`, or `reference_mixture_alpha=0`."
    )


def starts_as_base(peft_config: PeftConfig | None) -> bool:
    """Whether a model with this new adapter (or none) still computes what the base model does, as far as is known."""
    if peft_config is None or peft_config.peft_type == "LN_TUNING":
        return True
    if peft_config.peft_type == "LORA":
        return peft_config.init_lora_weights in _NEUTRAL_INITIALISATIONS and not peft_config.layer_replication
    is_default = any(getattr(peft_config, field, None) is True for field in _INITIALISATION_FIELDS)
    return is_default and peft_config.peft_type != "UNILORA"  # whose default does change the model


def settle_reference_adapter(model: PreTrainedModel | PeftModel, is_needed: bool) -> None:
    """See to the adapter "ref", DPOTrainer's copy of one that came trained: unless it is needed, it goes."""
    if not is_peft_model(model) or "ref" not in model.peft_config:
        return
    if not is_needed:
        model.delete_adapter("ref")
        return
    # DPOTrainer leaves out parameters whose names end in the adapter's: of LoRA for embeddings, of most other types.
    for name, parameter in model.named_parameters():
        if name.endswith(".default"):
            model.get_parameter(f"{name.removesuffix('default')}ref").data.copy_(parameter.data)


def precisions_of(model: PreTrainedModel | PeftModel) -> dict[str, torch.dtype]:
    """The precision of each parameter that is trained, by name."""
    return {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}


def restore_precisions(model: PreTrainedModel | PeftModel, precisions: dict[str, torch.dtype]) -> None:
    """Undo that PEFT loads an adapter in another precision than it was trained in, as it does on a quantized model."""
    for name, parameter in model.named_parameters():
        if parameter.dtype != precisions.get(name, parameter.dtype):
            parameter.data = parameter.data.to(precisions[name])
