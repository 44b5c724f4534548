"""In which form opponents are published, and what can be published in none."""

from types import SimpleNamespace

import pytest
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn

from spin_trl.policy.adapters import adapter_config
from spin_trl.policy.published_form import Publication, plan_publication
from spin_trl.policy.sharding import Sharding


def lora(**options) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["linear"], **options})


def plan(config, served=True, quantized=False, sharding=Sharding()) -> Publication:  # noqa: B008
    return plan_publication(config, served, quantized, sharding)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(model_type="net")
        self.linear = nn.Linear(8, 8)


IA3 = IA3Config(target_modules=["linear"], feedforward_modules=[])
PROMPT = PromptTuningConfig(num_virtual_tokens=4)
FSDP = Sharding("fsdp", 2)


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({"task_type": "CAUSAL_LM", "base_model_name_or_path": "org/base", "inference_mode": False}, 4),
        ({"use_rslora": True, "modules_to_save": [], "lora_dropout": 0.1, "layers_to_transform": [0]}, 4),
        ({"alpha_pattern": {"q_proj": 3}}, 4),
        ({"rank_pattern": {"q_proj": 32, "k_proj": 2}}, 32),
        ({"rank_pattern": {"q_proj": 2}}, 4),
        ({"init_lora_weights": "gaussian"}, 4),
    ],
    ids=str,
)
def test_adapter_that_vllm_loads_is_published_alone_with_the_largest_rank_of_any_module(options, rank):
    is_scaled = not {"rank_pattern", "alpha_pattern"}.isdisjoint(options)
    publication = plan(lora(**options))
    assert publication == Publication("adapter", lora_rank=rank, folds_scaling=is_scaled)
    assert str(publication) == ""
    assert plan(lora(**options), quantized=True, sharding=FSDP) == publication


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lora(use_dora=True), "`use_dora=True`"),
        (lora(modules_to_save=["head"]), "`modules_to_save=['head']`"),
        (lora(trainable_token_indices=[1]), "`trainable_token_indices=[1]`"),
        (lora(init_lora_weights="pissa"), "`init_lora_weights='pissa'`"),
        (IA3, "`peft_type='IA3'`"),
        (lora(use_dora=True, bias="all"), "`bias='all'` and `use_dora=True`"),
    ],
    ids=["dora", "modules to save", "tokens", "pissa", "ia3", "two"],
)
def test_adapter_that_vllm_cannot_load_is_merged_where_that_is_exact_and_the_user_told_why(config, reason):
    publication = plan(config)
    assert publication == Publication("merged", reason=reason)
    assert f"vLLM cannot load adapters with {reason}. Each iteration saves a whole model" in str(publication)
    with pytest.raises(ValueError, match="into a quantized base they cannot be merged without loss.*`use_vllm=False`"):
        plan(config, quantized=True)
    with pytest.raises(ValueError, match="which DeepSpeed ZeRO-3 spreads.*plain `LoraConfig`"):
        plan(config, sharding=Sharding("deepspeed", 3))


@pytest.mark.parametrize("config", [lora(use_dora=True), IA3, PROMPT], ids=["dora", "ia3", "prompt"])
def test_in_process_plays_adapters_of_every_kind_as_they_are(config):
    assert plan(config, served=False, quantized=True, sharding=FSDP) == Publication("adapter")


def test_without_an_adapter_the_weights_are_published():
    assert plan(None) == plan(None, served=False) == Publication("weights")


def test_adapter_that_the_model_brings_is_found_if_it_is_the_one_that_is_trained_and_published():
    model = get_peft_model(Net(), lora(r=6))
    assert adapter_config(Net(), None) is None and adapter_config(model, None).r == 6
    model.add_adapter("other", lora())
    assert adapter_config(model, None).r == 6
    model.set_adapter("other")
    with pytest.raises(ValueError, match=r"\['other'\] are active.*`model.set_adapter\('default'\)`"):
        adapter_config(model, None)
    with pytest.raises(ValueError, match=r"\['sft'\] are active.*adapter_name='default'"):
        adapter_config(PeftModel(Net(), lora(), adapter_name="sft"), None)
