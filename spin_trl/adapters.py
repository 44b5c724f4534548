"""What a PEFT configuration means for publishing an opponent. Knows nothing of servers."""

from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

# Initialisations of LoRA that leave the model as it was.
_NEUTRAL_INITIALISATIONS = (True, "gaussian", "orthogonal")


def lora_rank_to_serve(
    model: "str | PreTrainedModel | PeftModel", peft_config: "PeftConfig | None", served: bool
) -> int | None:
    """
    Rank of the adapters that a server will be given, or `None` for full fine-tuning.

    Args:
        served (`bool`): Whether a server is to load the adapters, which has to be able to.

    Raises:
        `ValueError`: if vLLM cannot serve adapters of this kind.
    """
    if peft_config is None and not isinstance(model, str) and is_peft_model(model):
        if "default" not in model.peft_config:
            raise ValueError(
                f"The model's adapter is named {list(model.peft_config)}, but the one that is trained must be named "
                "'default'. Load it with `PeftModel.from_pretrained(..., adapter_name='default')`."
            )
        peft_config = model.peft_config["default"]
    if peft_config is None:
        return None
    if not served:
        return getattr(peft_config, "r", None)
    problems = []
    if peft_config.peft_type != "LORA":
        problems.append(f"`peft_type={peft_config.peft_type.value}`")
    for name, harmless in (("modules_to_save", None), ("use_dora", False), ("bias", "none")):
        if getattr(peft_config, name, harmless) not in (harmless, []):
            problems.append(f"`{name}={getattr(peft_config, name)!r}`")
    if problems:
        raise ValueError(
            f"A vLLM server cannot load adapters with {' and '.join(problems)}. Use a plain `LoraConfig`, or set "
            "`use_vllm=False` to generate in-process."
        )
    return max([peft_config.r, *(peft_config.rank_pattern or {}).values()])


def describe_adapter(
    model: "str | PreTrainedModel | PeftModel", peft_config: "PeftConfig | None"
) -> dict[str, Any] | None:
    """The configuration of the adapter that is trained, in an order that does not change; `None` without one."""
    if peft_config is None and not isinstance(model, str) and is_peft_model(model):
        peft_config = model.peft_config["default"]
    if peft_config is None:
        return None
    values = peft_config.to_dict()
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


def check_fixed_reference(peft_config: "PeftConfig | None") -> None:
    """
    Raises:
        `ValueError`: if the initial policy could not be had back by switching this new adapter off.
    """
    if not starts_as_base(peft_config):
        raise ValueError(
            "`opponent_reference='fixed'` takes the initial policy's log-probs with the adapter switched off, but with "
            f"`init_lora_weights={peft_config.init_lora_weights!r}` the model is another one then. Use "
            "`init_lora_weights=True`, or `opponent_reference='previous'`."
        )


def starts_as_base(peft_config: "PeftConfig | None") -> bool:
    """Whether a model with this new adapter (or none) still computes what the base model does."""
    return getattr(peft_config, "init_lora_weights", True) in _NEUTRAL_INITIALISATIONS
