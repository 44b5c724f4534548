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

from peft import LoraConfig, PeftConfig

from .sharding import Sharding


# vLLM reads these fields of `LoraConfig`, or they say nothing about a trained adapter's weights. It ignores
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
# Types that PEFT does not merge, or not exactly. tests/test_merging.py holds that it does all others, prompts aside.
UNMERGED_TYPES = set("ADAMSS ADAPTION_PROMPT BEFT LILY POLY SHADOW XLORA".split())


@dataclass(frozen=True)
class Publication:
    """
    How opponents are published.

    Args:
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
            f"with {self.reason}. Each iteration saves a whole model; a plain `LoraConfig` would be published alone."
        )


def plan_publication(config: PeftConfig | None, served: bool, quantized: bool, sharding: Sharding) -> Publication:
    """
    Args:
        config ([`~peft.PeftConfig`], *optional*): Of the adapter that is trained.
        served (`bool`): Whether a server is to play the opponents. In-process everything that trains can play.
        quantized (`bool`): Whether the base model is.

    Raises:
        `ValueError`: if the opponents can be had on a server in no way.
    """
    if config is None:
        return Publication("weights")
    if not served:
        return Publication("adapter")
    problems = _not_served(config)
    if not problems:
        largest_rank = max([config.r, *config.rank_pattern.values()])
        return Publication("adapter", largest_rank, folds_scaling=bool(config.rank_pattern or config.alpha_pattern))
    reason = " and ".join(f"`{name}={value!r}`" for name, value in problems.items())
    obstacle = obstacle_to_merging(config)
    if obstacle is None and quantized:
        obstacle = "into a quantized base they cannot be merged without loss"
    elif obstacle is None and sharding.spreads_weights:
        obstacle = f"they are merged only where each process has all weights, which {sharding} spreads"
    if obstacle is not None:
        raise ValueError(
            f"A vLLM server cannot load adapters with {reason}, and {obstacle}. Use a plain `LoraConfig`, or set "
            "`use_vllm=False` to generate in-process."
        )
    return Publication("merged", reason=reason)


def check_can_take_back(setting: str, remedy: str, publication: Publication, sharding: Sharding) -> None:
    """Raises `ValueError`, naming the setting and the remedy, if no saved opponent can be loaded into the policy."""
    if sharding.spreads_weights:
        reason = "under ZeRO-3 and FSDP each process holds only shards of it"
    elif publication.kind == "merged":
        reason = f"opponents are saved merged here, because vLLM cannot load adapters with {publication.reason}"
    elif publication.folds_scaling:
        reason = "for vLLM, opponents are saved with the scaling of `rank_pattern` and `alpha_pattern` in their weights"
    else:
        return
    raise ValueError(f"`{setting}` loads the opponent of an earlier iteration into the policy, but {reason}. {remedy}")


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
    is_lora = config.peft_type == "LORA"
    unmerged = _not_served(config).keys() - _MERGED_LORA_FIELDS if is_lora else config.peft_type.value in UNMERGED_TYPES
    return "PEFT is not known to merge them into the weights exactly" if unmerged else None
