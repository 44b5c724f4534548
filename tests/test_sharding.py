"""The policy made whole to generate with. That sharded policies really do is held in test_distributed.py."""

from contextlib import contextmanager

from spin_trl import SPINTrainer
from spin_trl.generation.policy_sampler import PolicySampler
from spin_trl.generation.sampler import SamplingParams


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
