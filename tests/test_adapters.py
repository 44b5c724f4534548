"""Which adapters a server can be given, and which leave the base model as it is."""

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn

from spin_trl.adapters import lora_rank_to_serve, starts_as_base


def lora(**options) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["linear"], **options})


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8)
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.linear(x))


# What is served


@pytest.mark.parametrize("served", [True, False])
def test_full_fine_tuning_serves_no_adapter(served):
    assert lora_rank_to_serve("model", None, served) is None
    assert lora_rank_to_serve(Net(), None, served) is None


@pytest.mark.parametrize("served", [True, False])
def test_rank_is_that_of_the_configuration(served):
    assert lora_rank_to_serve("model", lora(r=16), served) == 16


@pytest.mark.parametrize("served", [True, False])
def test_rank_of_an_adapter_that_the_model_brings_is_found(served):
    model = get_peft_model(Net(), lora(r=6))
    assert lora_rank_to_serve(model, None, served) == 6


def test_adapter_of_another_name_than_dpo_trainer_trains_is_refused_by_its_name():
    model = PeftModel(Net(), lora(r=6), adapter_name="sft")
    with pytest.raises(ValueError, match="sft.*default|default.*sft"):
        lora_rank_to_serve(model, None, served=True)


def test_rank_to_serve_is_the_largest_of_any_module():
    assert lora_rank_to_serve("model", lora(r=8, rank_pattern={"q_proj": 32, "k_proj": 2}), served=True) == 32
    assert lora_rank_to_serve("model", lora(r=8, rank_pattern={"q_proj": 2}), served=True) == 8


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (lora(use_dora=True), "`use_dora=True`"),
        (lora(bias="all"), "`bias='all'`"),
        (lora(modules_to_save=["head"]), r"`modules_to_save=\['head'\]`"),
        (IA3Config(target_modules=["linear"], feedforward_modules=[]), "`peft_type=IA3`"),
    ],
    ids=["dora", "bias", "modules to save", "ia3"],
)
def test_adapter_that_a_server_cannot_load_is_refused_by_its_setting(config, problem):
    with pytest.raises(ValueError, match=f"cannot load adapters with {problem}.*`use_vllm=False`"):
        lora_rank_to_serve("model", config, served=True)


def test_all_settings_that_a_server_cannot_load_are_named_at_once():
    with pytest.raises(ValueError, match="`use_dora=True` and `bias='all'`"):
        lora_rank_to_serve("model", lora(use_dora=True, bias="all"), served=True)


def test_adapter_of_the_model_itself_is_refused_too():
    model = get_peft_model(Net(), lora(modules_to_save=["head"]))
    with pytest.raises(ValueError, match="modules_to_save"):
        lora_rank_to_serve(model, None, served=True)


@pytest.mark.parametrize("options", [{"modules_to_save": []}, {"use_rslora": True}, {"lora_dropout": 0.1}], ids=str)
def test_settings_that_a_server_can_load_pass(options):
    assert lora_rank_to_serve("model", lora(**options), served=True) == 4


def test_in_process_plays_adapters_of_every_kind():
    assert lora_rank_to_serve("model", lora(use_dora=True, bias="all"), served=False) == 4
    config = IA3Config(target_modules=["linear"], feedforward_modules=[])
    assert lora_rank_to_serve("model", config, served=False) is None


# What starts as the base model


@pytest.mark.parametrize("initialisation", [True, "gaussian", "orthogonal", "pissa", "olora", False])
def test_adapter_starts_as_base_if_and_only_if_its_weights_change_nothing(initialisation):
    """PiSSA and OLoRA move a part of the base weights to the adapter: without it, a server's base model is another."""
    config = lora(init_lora_weights=initialisation)
    inputs = torch.ones(1, 8)
    base = Net()
    outputs = base(inputs)
    model = get_peft_model(base, config)
    with model.disable_adapter():
        base_is_untouched = torch.allclose(model(inputs), outputs)
    changes_nothing = torch.allclose(model(inputs), outputs, atol=1e-6)
    assert starts_as_base(config) is (base_is_untouched and changes_nothing)


def test_no_adapter_starts_as_base():
    assert starts_as_base(None) is True
