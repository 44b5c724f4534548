"""In which form opponents are published, and what can be published in none."""

from types import SimpleNamespace

import pytest
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn

from spin_trl.policy.published_form import Publication, plan_publication
from spin_trl.policy.sharding import Sharding


def lora(**options) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["linear"], **options})


IA3 = IA3Config(target_modules=["linear"], feedforward_modules=[])


def plan(model="model", config=None, **options) -> Publication:
    return plan_publication(model, config, **{"served": True, **options})


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(model_type="net")
        self.linear = nn.Linear(8, 8)
        self.head = nn.Linear(8, 8)


@pytest.mark.parametrize("served", [True, False])
def test_full_fine_tuning_publishes_weights(served):
    assert plan("model", served=served) == plan(Net(), served=served) == Publication("weights")


@pytest.mark.parametrize(
    "options",
    [
        {"task_type": "CAUSAL_LM", "base_model_name_or_path": "org/base", "inference_mode": False},
        {"use_rslora": True, "modules_to_save": [], "lora_dropout": 0.1, "layers_to_transform": [0]},
        {"alpha_pattern": {"q_proj": 3}},
        {"init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_adapter_that_vllm_loads_is_published_alone(options):
    publication = plan(config=lora(**options))
    assert publication == Publication("adapter", lora_rank=4, folds_scaling="alpha_pattern" in options)
    assert str(publication) == ""


@pytest.mark.parametrize(("pattern", "largest"), [({"q_proj": 32, "k_proj": 2}, 32), ({"q_proj": 2}, 8)])
def test_rank_to_serve_is_the_largest_of_any_module(pattern, largest):
    assert plan(config=lora(r=8, rank_pattern=pattern)).lora_rank == largest


def test_adapter_that_the_model_brings_is_found():
    assert plan(get_peft_model(Net(), lora(r=6))) == Publication("adapter", lora_rank=6)
    assert plan(get_peft_model(Net(), lora(modules_to_save=["head"]))).kind == "merged"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lora(use_dora=True), "`use_dora=True`"),
        (lora(bias="all"), "`bias='all'`"),
        (lora(modules_to_save=["head"]), "`modules_to_save=['head']`"),
        (lora(trainable_token_indices=[1]), "`trainable_token_indices=[1]`"),
        (lora(init_lora_weights="pissa"), "`init_lora_weights='pissa'`"),
        (IA3, "`peft_type='IA3'`"),
        (lora(use_dora=True, bias="all"), "`bias='all'` and `use_dora=True`"),
    ],
    ids=["dora", "bias", "modules to save", "tokens", "pissa", "ia3", "two"],
)
def test_adapter_that_vllm_cannot_load_is_merged_and_the_user_told_why(config, reason):
    publication = plan(config=config)
    assert publication == Publication("merged", lora_rank=None, reason=reason)
    assert f"vLLM cannot load adapters with {reason}. Each iteration saves a whole model" in str(publication)


@pytest.mark.parametrize("config", [lora(use_dora=True), IA3], ids=["dora", "ia3"])
def test_merging_into_a_quantized_or_a_sharded_base_is_refused(config):
    with pytest.raises(ValueError, match="into a quantized base they cannot be merged without loss.*`use_vllm=False`"):
        plan(config=config, quantized=True)
    with pytest.raises(ValueError, match="which DeepSpeed ZeRO-3 spreads.*plain `LoraConfig`"):
        plan(config=config, sharding=Sharding("deepspeed", 3))


def test_plain_adapter_to_a_quantized_or_a_sharded_base_is_published_alone():
    assert plan(config=lora(), quantized=True, sharding=Sharding("fsdp", 2)) == Publication("adapter", lora_rank=4)


@pytest.mark.parametrize(
    "config", [lora(use_dora=True), IA3, PromptTuningConfig(num_virtual_tokens=4)], ids=["dora", "ia3", "prompt"]
)
def test_in_process_plays_adapters_of_every_kind_as_they_are(config):
    assert plan(config=config, served=False, quantized=True, sharding=Sharding("fsdp", 2)) == Publication("adapter")


def test_other_adapter_than_the_one_that_is_trained_and_published_must_not_be_active():
    with pytest.raises(ValueError, match=r"\['sft'\] are active.*adapter_name='default'"):
        plan(PeftModel(Net(), lora(), adapter_name="sft"))
    model = get_peft_model(Net(), lora())
    model.add_adapter("other", lora())
    assert plan(model).kind == "adapter"
    model.set_adapter("other")
    with pytest.raises(ValueError, match=r"\['other'\] are active.*`model.set_adapter\('default'\)`"):
        plan(model)
