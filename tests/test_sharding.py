"""The policy made whole to generate with. That sharded policies really do is held in test_distributed.py."""

from contextlib import contextmanager

import pytest

from spin_trl import SPINTrainer
from spin_trl.generation.policy_sampler import PolicySampler
from spin_trl.generation.sampler import SamplingParams
from spin_trl.policy.sharding import Sharding


@pytest.mark.parametrize(
    ("fields", "environment", "expected"),
    [
        ({}, {}, None),
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
    assert sharding is None or sharding.spreads_weights


@pytest.mark.parametrize(("stage", "spreads"), [(1, False), (2, False), (3, True)])
def test_deepspeed_spreads_the_weights_in_its_third_stage_only(stage, spreads):
    assert Sharding("deepspeed", stage).spreads_weights is spreads


def test_policy_is_opened_once_even_by_a_process_without_requests():
    """Processes gather the weights together, so one with nothing to do has to take part."""
    opened = []

    @contextmanager
    def open_policy():
        opened.append(True)
        yield None

    params = SamplingParams(max_completion_length=1, end_token_ids=(0,))
    assert list(PolicySampler(open_policy, pad_token_id=0, batch_size=1).sample([], params)) == []
    assert opened == [True]


def test_policy_generates_without_dropout_and_trains_on_with_it(tiny_model, train_dataset, make_config):
    trainer = SPINTrainer(tiny_model, make_config(), train_dataset=train_dataset)
    trainer.model.train()
    with trainer.policy.whole() as model:
        assert not model.training
    assert trainer.model.training
