"""The policy made whole to generate with. That sharded policies really do is held in test_distributed.py."""

from contextlib import contextmanager

import pytest

from spin_trl import SPINTrainer
from spin_trl.generation.policy_sampler import PolicySampler
from spin_trl.generation.sampler import SamplingParams


def test_first_version_of_fsdp_is_refused_for_in_process_generation(
    tiny_model, train_dataset, make_config, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="version 1 of FSDP.*`fsdp_version: 2`"):
        SPINTrainer(tiny_model, make_config(), train_dataset=train_dataset)


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
    with trainer.open_policy() as model:
        assert not model.training
    assert trainer.model.training
