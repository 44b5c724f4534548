"""A policy with an adapter -> files that a server loads: merged or plain weights, adapters as vLLM reads them.

The policy itself is never touched: what is merged is a copy of one layer at a time, so no rounding creeps into what is
trained. Knows nothing of servers and iterations. Needs the weights whole: not for sharded policies.
"""

import copy
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.integrations.bitsandbytes import dequantize_bnb_weight


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_ADAPTER_CONFIG = "adapter_config.json"


def check_can_be_merged(model: "PeftModel") -> None:
    """
    Raises:
        `ValueError`: if merging would give the input and the output embeddings, which are one, two values.
    """
    base = model.get_base_model()
    if not base.config.get_text_config().tie_word_embeddings:
        return
    first, last = base.get_input_embeddings(), base.get_output_embeddings()
    if isinstance(first, BaseTunerLayer) != isinstance(last, BaseTunerLayer) or first.weight is not last.weight:
        raise ValueError(
            "The model ties its input and output embeddings, but the adapter changes one of them alone, and a vLLM "
            "server of this model has only one of them. Set `ensure_weight_tying=True` in the adapter's configuration, "
            "leave the embeddings out of it, or set `use_vllm=False` to generate in-process."
        )


def save_merged(model: "PeftModel", directory: str) -> None:
    """Save a model with its active adapter merged into the weights, as `save_pretrained` would."""
    _save(model.get_base_model(), _plain_weights(model, merge=True), directory)


def save_base(model: "PeftModel", directory: str) -> None:
    """Save the model below the adapter, with 4-bit weights as the numbers that they stand for."""
    _save(model.get_base_model(), _plain_weights(model, merge=False), directory)


def fold_scaling(directory: str) -> None:
    """
    Rewrite a saved LoRA adapter whose modules differ in rank or alpha, so that vLLM, which scales all modules alike,
    computes with it what PEFT does. PEFT still computes the same with it as before.
    """
    config_path, weights_path = Path(directory, _ADAPTER_CONFIG), Path(directory, _ADAPTER_WEIGHTS)
    config = json.loads(config_path.read_text())
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    if not ranks and not alphas:
        return

    def scaling(alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    common = scaling(config["lora_alpha"], config["r"])
    weights = load_file(weights_path)
    for name, weight in weights.items():
        if "lora_B" in name or "lora_embedding_B" in name:
            module = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
            rank = ranks.get(get_pattern_key(ranks, module), config["r"])
            alpha = alphas.get(get_pattern_key(alphas, module), config["lora_alpha"])
            weights[name] = weight * (scaling(alpha, rank) / common)
    config["alpha_pattern"] = {key: common / scaling(1, rank) for key, rank in ranks.items()}
    save_file(weights, weights_path, metadata={"format": "pt"})
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True))


def _save(base: "PreTrainedModel", weights: dict[str, torch.Tensor], directory: str) -> None:
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        bare = type(base)(config)  # knows the names of the files' weights; holds no adapter, no quantization
    bare.generation_config = base.generation_config
    bare.to(base.dtype).save_pretrained(directory, state_dict=weights)


def _plain_weights(model: "PeftModel", merge: bool) -> dict[str, torch.Tensor]:
    """The weights under the names that they have without PEFT. Only those that are merged or dequantized are copies."""
    base = model.get_base_model()
    wrapped = _wrapped_modules(base)
    weights = _numbers(base, skipped=tuple(f"{name}." for name in wrapped))
    for name, module in wrapped.items():
        weights |= {f"{name}.{key}": value for key, value in _numbers(_plain(module, merge)).items()}
    return weights


def _wrapped_modules(base: nn.Module) -> dict[str, nn.Module]:
    """The outermost modules that PEFT put in place of the model's own, by the names of those."""
    found: dict[str, nn.Module] = {}

    def look(module: nn.Module, name: str) -> None:
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            found[name] = module
            return
        for child_name, child in module.named_children():
            look(child, f"{name}.{child_name}" if name else child_name)

    look(base, "")
    return found


def _plain(module: nn.Module, merge: bool) -> nn.Module:
    """The module without PEFT around it, with the adapter merged into a copy of it or left out."""
    if isinstance(module, ModulesToSaveWrapper):
        inner = module.modules_to_save[module.active_adapter] if merge else module.original_module
        return _plain(inner, merge) if isinstance(inner, BaseTunerLayer) else inner
    if isinstance(module, AuxiliaryTrainingWrapper):
        return copy.deepcopy(module).unload_and_optionally_merge_module(merge, safe_merge=False, adapter_names=None)
    if not merge:
        return module.get_base_layer()
    merged = copy.deepcopy(module)
    merged.merge(safe_merge=False)
    return merged.get_base_layer()


def _numbers(module: nn.Module, skipped: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """A module's state, on the CPU, without what lies under the `skipped` names."""
    state = {key: value for key, value in module.state_dict().items() if not key.startswith(skipped)}
    for name, child in module.named_modules():
        key = f"{name}.weight" if name else "weight"
        if type(getattr(child, "weight", None)).__name__ == "Params4bit" and not key.startswith(skipped):
            for stale in [other for other in state if other.startswith(key)]:  # the packed numbers and their scales
                del state[stale]
            state[key] = dequantize_bnb_weight(child.weight)
    return {key: value.detach().cpu() for key, value in state.items()}
