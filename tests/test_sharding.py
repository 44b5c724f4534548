"""The policy made whole to generate with. That sharded policies really do is held in test_distributed.py."""

import pytest

from spin_trl import SPINTrainer
from spin_trl.policy.sharding import Sharding


@pytest.mark.parametrize(
    ("fields", "environment", "expected"),
    [
        ({}, {}, Sharding()),
        ({"fsdp": True, "fsdp_config": {"version": 2}}, {}, Sharding("fsdp", 2)),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, Sharding("fsdp", 1)),
        ({}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, Sharding("fsdp", 2)),
    ],
    ids=["none", "arguments", "launcher", "launcher, version 2"],
)
def test_what_shards_the_weights_is_known_before_the_model_is_loaded(
    make_config, monkeypatch, fields, environment, expected
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    sharding = Sharding.of(make_config(**fields))
    assert sharding == expected
    assert sharding.spreads_weights is (sharding != Sharding())


def test_policy_generates_without_dropout_and_trains_on_with_it(tiny_model, train_dataset, make_config):
    trainer = SPINTrainer(tiny_model, make_config(), train_dataset=train_dataset)
    trainer.model.train()
    with trainer.policy.whole() as model:
        assert not model.training
    assert trainer.model.training
