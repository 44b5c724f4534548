"""Which adapters leave the base model as it is."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from spin_trl.policy.adapters import starts_as_base


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
