"""In which form the opponents of a run get onto a server. Knows nothing of servers, files and tensors.

| what is trained | published as |
| --- | --- |
| all weights | full weights |
| LoRA, rsLoRA, other ranks or alphas for some modules | the adapter alone |
| LoRA with DoRA, `modules_to_save`, `bias`, an initialisation that changes the base model, ... | merged |
| other types that PEFT merges exactly: IA3, LoHa, LoKr, OFT, VeRA, ... | merged |
| prompt learning, types that PEFT does not merge, what would be merged into a quantized base | not: in-process only |

Merged means that a copy of the policy with the adapter in its weights is published as full weights are.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal

from accelerate.utils import is_peft_model
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import PreTrainedModel

from .sharding import Sharding


# Fields of `LoraConfig` that vLLM reads, or that say nothing about a trained adapter's weights. It ignores
# `rank_pattern` and `alpha_pattern`: `merging.fold_scaling` sees to them.
_SERVED_LORA_FIELDS = set(
    """
    alpha_pattern corda_config ensure_weight_tying eva_config exclude_modules fan_in_fan_out layers_pattern
    layers_to_transform loftq_config lora_alpha lora_dropout lora_ga_config megatron_config megatron_core
    qalora_group_size r rank_pattern runtime_config target_modules use_rslora
    """.split()
)
_MERGED_LORA_FIELDS = set("bias init_lora_weights lora_bias modules_to_save trainable_token_indices use_dora".split())
# The others move a part of the base weights into the adapter, which alone is not the policy then.
_INITIALISATIONS_BESIDE_THE_BASE = (True, False, "gaussian", "orthogonal", "eva", "mica")
# Types whose merged weights compute what the adapter did: tests/test_merging.py sees to it for each.
MERGED_TYPES = set(
    """
    ADALORA BOFT C3A DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA IA3 LN_TUNING LOHA LOKR MISS OFT OSF PEANUT PSOFT
    PVERA RANDLORA ROAD SHIRA SUPERTUNING TINYLORA TRAINABLE_TOKENS UNILORA VBLORA VERA WAVEFT
    """.split()
)
_ON_DISK = (
    "Leave it unset: every opponent is saved in `iteration-*/opponent`, and `self_play.json` names the one that counts."
)


@dataclass(frozen=True)
class Publication:
    """
    How opponents are published.

    Args:
        kind (`str`): `"weights"`, `"adapter"` or `"merged"`.
        lora_rank (`int`, *optional*): Largest rank of the adapters that a server is given; `None` for weights.
        reason (`str`): Why they are merged.
        folds_scaling (`bool`): Whether adapters are rewritten for vLLM, see [`fold_scaling`].
    """

    kind: Literal["weights", "adapter", "merged"]
    lora_rank: int | None = None
    reason: str = ""
    folds_scaling: bool = False

    def __str__(self) -> str:
        """What the user should know about it; empty for what they would expect."""
        if self.kind != "merged":
            return ""
        return (
            f"Opponents are published as full weights, with the adapter merged into a copy: vLLM cannot load adapters "
            f"with {self.reason}. Each iteration saves a whole model; a plain `LoraConfig` would be published alone, "
            "which is several times quicker."
        )


def plan_publication(
    model: str | PreTrainedModel | PeftModel,
    peft_config: PeftConfig | None,
    served: bool,
    quantized: bool = False,
    sharding: Sharding | None = None,
) -> Publication:
    """
    Args:
        served (`bool`): Whether a server is to play the opponents. In-process everything that trains can play.
        quantized (`bool`): Whether the base model is.
        sharding ([`Sharding`], *optional*): What will be spread over the processes, if anything is.

    Raises:
        `ValueError`: if the opponents can be had on a server in no way.
    """
    config = adapter_config(model, peft_config)
    if config is None:
        return Publication("weights")
    if not served:
        return Publication("adapter")
    problems = _not_served(config)
    if not problems:
        largest_rank = max([config.r, *config.rank_pattern.values()])
        return Publication("adapter", largest_rank, folds_scaling=bool(config.rank_pattern or config.alpha_pattern))
    reason = " and ".join(f"`{name}={value!r}`" for name, value in problems.items())
    if (obstacle := obstacle_to_merging(config) or _obstacle_here(quantized, sharding)) is not None:
        raise ValueError(
            f"A vLLM server cannot load adapters with {reason}, and {obstacle}. Use a plain `LoraConfig`, or set "
            "`use_vllm=False` to generate in-process."
        )
    return Publication("merged", reason=reason)


def check_can_take_back(
    setting: str, publication: Publication, sharding: Sharding | None, remedy: str = _ON_DISK
) -> None:
    """
    Args:
        setting (`str`): What asks for it, as in the configuration.
        remedy (`str`): What to do about it.

    Raises:
        `ValueError`: if a saved opponent could not be loaded into the policy.
    """
    reason = None
    if sharding is not None and sharding.spreads_weights:
        reason = "under ZeRO-3 and FSDP each process holds only shards of it"
    elif publication.kind == "merged":
        reason = f"opponents are saved merged here, because vLLM cannot load adapters with {publication.reason}"
    elif publication.folds_scaling:
        reason = "for vLLM, opponents are saved with the scaling of `rank_pattern` and `alpha_pattern` in their weights"
    if reason is not None:
        raise ValueError(
            f"`{setting}` loads the opponent of an earlier iteration into the policy, but {reason}. {remedy}"
        )


def check_can_lend(num_opponents: int, publication: Publication, sharding: Sharding | None) -> None:
    """
    As [`check_can_take_back`], for a while.

    Raises:
        `ValueError`: if the policy could not play an earlier opponent in-process.
    """
    remedy = "Use a vLLM server, which loads opponents itself, or leave `num_opponents` unset."
    check_can_take_back(f"num_opponents={num_opponents}", publication, sharding, remedy)


def adapter_config(model: str | PreTrainedModel | PeftModel, peft_config: PeftConfig | None) -> PeftConfig | None:
    """
    The configuration of the adapter that is trained, whether it is new or the model brings it.

    Raises:
        `ValueError`: if the model brings adapters, of which DPOTrainer would train others than it saves.
    """
    if peft_config is not None or isinstance(model, str) or not is_peft_model(model):
        return peft_config
    names, active = list(model.peft_config), list(model.active_adapters)
    if "default" not in names:
        raise ValueError(
            f"The model's adapter is named {names}, but the one that is trained must be named 'default'. Load it with "
            "`PeftModel.from_pretrained(..., adapter_name='default')`."
        )
    if active != ["default"]:
        raise ValueError(
            f"Of the model's adapters {names}, {active} are active, but trained and published is 'default'. Call "
            "`model.set_adapter('default')`, or load the adapter to train under that name."
        )
    return model.peft_config["default"]


def _not_served(config: PeftConfig) -> dict[str, Any]:
    """The settings of a configuration with which vLLM cannot load its adapters."""
    if config.peft_type != "LORA":
        return {"peft_type": config.peft_type.value}
    known = _SERVED_LORA_FIELDS | {field.name for field in fields(PeftConfig)}
    names = [field.name for field in fields(LoraConfig) if field.name not in known]
    settings = {name: getattr(config, name, None) for name in names}
    if settings["init_lora_weights"] in _INITIALISATIONS_BESIDE_THE_BASE:
        del settings["init_lora_weights"]
    return {name: value for name, value in settings.items() if value and value != "none"}


def obstacle_to_merging(config: PeftConfig) -> str | None:
    """Why an adapter cannot be merged exactly into the weights of its base model, in words."""
    if config.is_prompt_learning:
        return "a learned prompt is no part of the weights, so it cannot be merged into them"
    if config.peft_type == "LORA":
        is_exact = _not_served(config).keys() <= _MERGED_LORA_FIELDS
    else:
        is_exact = config.peft_type.value in MERGED_TYPES
    return None if is_exact else "PEFT is not known to merge them into the weights exactly"


def _obstacle_here(quantized: bool, sharding: Sharding | None) -> str | None:
    if quantized:
        return "into a quantized base they cannot be merged without loss"
    if sharding is not None and sharding.spreads_weights:
        return f"they are merged only where each process has all weights, which {sharding} spreads"
    return None
