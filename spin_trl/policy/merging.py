"""A policy with an adapter -> files that vLLM, or anybody without PEFT, loads: merged or plain weights, plain adapters.

The policy itself is never touched: what is merged is a copy, so no rounding creeps into what is trained. Knows nothing
of servers and iterations.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import deepspeed
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from trl.trainer.utils import create_model_from_path

from ..spin_config import SPINConfig
from .inputs import model_config, source_kwargs
from .published_form import obstacle_to_merging


def check_can_merge_at_end(config: PeftConfig | None, base_model: str, args: SPINConfig) -> None:
    """Raises `ValueError` if there is no adapter that can be merged, or no saved base to merge it into."""
    if config is None:
        found = "there is no adapter: all weights are trained, and saved. Leave it unset, or pass a `peft_config`"
    elif (obstacle := obstacle_to_merging(config)) is not None:
        found = f"with `peft_type={config.peft_type.value}` {obstacle}. Leave it unset, or use a plain `LoraConfig`"
    elif not base_model:
        found = (
            "the model passed comes from no folder and no hub. Save it with `model.save_pretrained(folder)` and pass "
            "`model=folder`"
        )
    elif hasattr(model_config(base_model, args), "quantization_config"):
        found = (
            f"the weights of {base_model!r} are saved quantised. Pass the model that was quantised and a "
            "`quantization_config`, or leave it unset"
        )
    else:
        return
    raise ValueError(f"`merge_adapter_at_end=True` merges the adapter into the base model's weights, but {found}.")


def check_can_be_merged(model: PeftModel) -> None:
    """Raises `ValueError` if merging would give the input and the output embeddings, which are one, two values."""
    base = model.get_base_model()
    if not base.config.get_text_config().tie_word_embeddings:
        return
    first, last = base.get_input_embeddings(), base.get_output_embeddings()
    if isinstance(first, BaseTunerLayer) != isinstance(last, BaseTunerLayer) or first.weight is not last.weight:
        raise ValueError(
            "The model ties its input and output embeddings, but the adapter changes one of them alone, and a vLLM "
            "server has only one. Set `ensure_weight_tying=True` in the adapter's configuration, leave the embeddings "
            "out of it, or set `use_vllm=False` to generate in-process."
        )


def merge_into_saved(base_model: str, adapter: Path, args: SPINConfig) -> PreTrainedModel:
    """
    A saved adapter merged into the base model as that was saved, in its own precision: so it makes no difference
    whether the policy is sharded or its base is quantised. One process calls it.
    """
    with _of_this_process_alone():
        base = create_model_from_path(base_model, **source_kwargs(args), dtype="auto", device_map=None)
        return PeftModel.from_pretrained(base, adapter).merge_and_unload(safe_merge=True)


def save_merged(model: PeftModel, directory: str) -> None:
    """Save a model with its active adapter merged into the weights. Needs all weights, none of them quantized."""
    _copy_in_host_memory(model).merge_and_unload().save_pretrained(directory)


def save_base(model: PeftModel, directory: str) -> None:
    """Save the model below the adapter, which is quantized to 4 bits, as the numbers that these stand for."""
    base = _copy_in_host_memory(model).unload()
    base.hf_quantizer.remove_quantization_config(base)
    base.save_pretrained(directory)


def fold_scaling(directory: str) -> None:
    """
    Rewrite a saved LoRA adapter whose modules differ in rank or alpha, so that vLLM, which scales all modules alike,
    computes with it what PEFT does. PEFT still computes the same with it as before.
    """
    config, weights_path = LoraConfig.from_pretrained(directory), Path(directory, SAFETENSORS_WEIGHTS_NAME)
    ranks, alphas = config.rank_pattern, config.alpha_pattern

    def divisor(rank: int) -> float:
        return math.sqrt(rank) if config.use_rslora else rank

    common = config.lora_alpha / divisor(config.r)
    weights = load_file(weights_path)
    for name, weight in weights.items():
        if "lora_B" in name or "lora_embedding_B" in name:
            module = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
            rank = ranks.get(get_pattern_key(ranks, module), config.r)
            alpha = alphas.get(get_pattern_key(alphas, module), config.lora_alpha)
            weights[name] = weight * (alpha / divisor(rank) / common)
    config.alpha_pattern = {key: common * divisor(rank) for key, rank in ranks.items()}
    save_file(weights, weights_path, metadata={"format": "pt"})
    config.save_pretrained(directory)


@contextmanager
def _of_this_process_alone() -> Iterator[None]:
    """Under ZeRO-3 transformers spreads every model that is made over all processes, and waits for them to make it."""
    reference = deepspeed._hf_deepspeed_config_weak_ref
    config = None if reference is None else reference()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def _copy_in_host_memory(model: PeftModel) -> PeftModel:
    """A copy whose tensors lie in host memory, 4-bit weights among them as plain numbers. What is tied stays tied."""

    def plain(parameter: nn.Parameter) -> nn.Parameter:
        is_4bit = type(parameter).__name__ == "Params4bit"
        numbers = dequantize_bnb_weight(parameter).cpu() if is_4bit else parameter.detach().to("cpu", copy=True)
        return nn.Parameter(numbers, requires_grad=False)

    copies = {id(parameter): plain(parameter) for parameter in model.parameters()}
    copies |= {id(buffer): buffer.to("cpu", copy=True) for buffer in model.buffers()}
    return copy.deepcopy(model, copies)  # takes these for what it has copied already
