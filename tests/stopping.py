"""Runs that are stopped on purpose, and what tells that one ended as another."""

import pytest
import torch
from transformers import TrainerCallback

from spin_trl import SPINTrainer


class AtStep(TrainerCallback):
    """Calls a function at the end of a step; by default one that stops the run."""

    def __init__(self, step: int, act=None):
        self.step, self.act = step, act or fail

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


def fail() -> None:
    raise ZeroDivisionError("stopped by the test")


def train_until_stopped(trainer: SPINTrainer) -> SPINTrainer:
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    return trainer


def stop_after(make_trainer, step: int, **overrides) -> SPINTrainer:
    return train_until_stopped(make_trainer(AtStep(step), **overrides))


def weights(trainer: SPINTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_same_weights(trainer: SPINTrainer, expected: dict[str, torch.Tensor]) -> None:
    found = weights(trainer)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
