"""What every loss type computes, through the trainer's own code on log-probs made up for the test (`LossProbe`).

What their fields do is in test_theory.py, and the gradient of every one in test_pairs.py.
"""

import inspect
import math
import re
from functools import partial

import pytest
import torch
from trl import DPOTrainer

from spin_trl.objectives import OBJECTIVES, LogProbs, Objective, register


def sigmoid(t: float) -> float:
    return 1 / (1 + math.exp(-t))


EQUAL = torch.tensor([-3.0, -7.0])
T = 0.1 * (2.0 - -1.0)  # beta * (r(y) - r(y')) with r(y) = 2 and r(y') = -1

# By hand, at beta 0.1: value where the policy is the opponent, and value at r(y) = 2 and r(y') = -1 (log p(y) = -1).
BY_HAND = {
    "sigmoid": (math.log(2), -math.log(sigmoid(T))),
    "hinge": (1.0, 1 - T),
    "exponential": (1.0, math.exp(-T)),
    "correlation": (1.0, 1 - T),
    "space": (2 * math.log(2), -math.log(sigmoid(2)) - math.log(sigmoid(1))),
    "t_spin": (math.log(2), -math.log(sigmoid(3))),
    "iris": (0.0, -3.0),  # of a single pair its exponentials and logarithms cancel
    "ipo": (25.0, (3 - 5) ** 2),
    "bco_pair": (2 * math.log(2), -math.log(sigmoid(0.2)) - math.log(sigmoid(0.1))),
    "sppo_hard": (50.0, (2 - 5) ** 2 + (-1 + 5) ** 2),
    "apo_zero": (1.0, 1 - sigmoid(0.2) + sigmoid(-0.1)),
    "apo_down": (1.0, sigmoid(0.2) + 1 - sigmoid(T)),
    "sft": (5.0, 1.0),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_value_by_hand(loss, name):
    at_opponent, elsewhere = BY_HAND[name]
    assert loss([name], (EQUAL, EQUAL), (EQUAL, EQUAL)).item() == pytest.approx(at_opponent, abs=1e-5)
    logps = torch.tensor([-1.0]), torch.tensor([-4.0])
    ref_logps = torch.tensor([-3.0]), torch.tensor([-3.0])
    assert loss([name], logps, ref_logps).item() == pytest.approx(elsewhere, abs=1e-5)


def test_iris_stays_finite_where_the_exponentials_overflow(loss):
    logps = torch.tensor([300.0, -300.0], requires_grad=True), torch.tensor([400.0, -400.0])
    value = loss(["iris"], logps, torch.zeros(2, 2), iris_alpha=3.0)
    value.backward()
    # All weight is on the largest of each: -[1/2 * (600 - log 2) - 1/3 * (1200 - log 2)].
    assert value.item() == pytest.approx(-300 + math.log(2) / 2 + 400 - math.log(2) / 3, rel=1e-5)
    assert logps[0].grad.tolist() == pytest.approx([-1, 0])


def random_logps(seed: int, count: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(-20 * torch.rand(2, count, generator=generator))


@pytest.mark.parametrize("names", [["sigmoid", "sft"], ["t_spin", "iris", "sft"], ["space", "correlation", "sigmoid"]])
def test_mix_is_the_weighted_sum_from_one_forward(loss, names):
    logps, ref_logps = random_logps(6), random_logps(7)
    if "t_spin" in names:
        logps = (*logps, random_logps(11)[0])
    weights = [0.5, 2.0, 0.25][: len(names)]
    alone = [loss([name], logps, ref_logps).item() for name in names]
    loss.num_forwards = 0
    mixed = loss(names, logps, ref_logps, loss_weights=weights).item()
    assert loss.num_forwards == 1
    assert mixed == pytest.approx(sum(w * value for w, value in zip(weights, alone, strict=True)), rel=1e-5)


def test_trl_losses_are_those_that_dpo_trainer_computes():
    source = inspect.getsource(DPOTrainer._compute_loss)
    assert set(re.findall(r'loss_type == "(\w+)"', source)) == {n for n, loss in OBJECTIVES.items() if not loss.is_own}


@pytest.mark.parametrize(
    ("fields", "first_loss"),
    [
        ({"loss_type": ["exponential", "correlation"], "loss_weights": [0.5, 1.0]}, 1.5),
        ({"loss_type": "iris"}, 0.0),
        ({"loss_type": "space", "space_mu": 3.0, "num_generations": 3}, 2.2493),
    ],
    ids=["two", "iris", "space"],
)
def test_whole_run_with_a_loss_that_trl_lacks(play_run, fields, first_loss):
    """
    At the first step of each iteration rewards are 0, and the loss is what it is where the policy is the opponent. 48
    pairs are six steps; in iteration 1 the older ones join them, for `space` and `iris` on demand alone.
    """
    settings = {"num_iterations": 2, "num_history_iterations": 1, "learning_rate": 1e-4, "max_steps": 7}
    trainer = play_run(48 // fields.get("num_generations", 1), **settings, **fields)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 7
    for first in (steps[0], steps[6]):
        assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
        assert first["loss"] == pytest.approx(first_loss, abs=1e-4)
    assert steps[5]["rewards/margins"] > 0


def squared(logps: LogProbs, beta: float, target: float) -> torch.Tensor:
    return (beta * (logps.chosen_logratios - logps.rejected_logratios) - target) ** 2


@pytest.fixture
def loss_from_outside():
    register(Objective("squared", partial(squared, target=2.0), is_of_difference=True))
    yield "squared"
    del OBJECTIVES["squared"]


def test_run_trains_with_a_loss_from_outside_and_settings_are_held_against_its_traits(
    loss, play_run, make_config, loss_from_outside
):
    """By hand, with r(y) - r(y') = 3 and beta 0.1: (0.3 - 2)^2, and in the first step 2^2."""
    logps = torch.tensor([-1.0]), torch.tensor([-4.0])
    assert loss([loss_from_outside], logps, (EQUAL[:1], EQUAL[:1])).item() == pytest.approx(2.89, rel=1e-5)
    trainer = play_run(num_iterations=1, loss_type=[loss_from_outside, "sft"], loss_weights=[1.0, 0.0])
    steps = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 6 and steps[0] == pytest.approx(4.0, abs=1e-4) and steps[-1] < 3.99
    assert make_config(loss_type=loss_from_outside, reference_mixture_alpha=0.5).loss_type == [loss_from_outside]
    with pytest.raises(ValueError, match=f"`loss_type='{loss_from_outside}'` contradicts `ld_alpha=0.5`"):
        make_config(loss_type=loss_from_outside, ld_alpha=0.5)


def test_name_is_registered_once(loss_from_outside):
    for name in (loss_from_outside, "sigmoid", "space"):
        with pytest.raises(ValueError, match=f"'{name}' is registered already. Give yours another name"):
            register(Objective(name, squared))


@pytest.mark.parametrize(("loss_type", "max_steps"), [("t_spin", 3), ("iris", 1)])
def test_gradients_of_micro_batches_add_up_to_that_of_the_whole(build_trainer, tmp_path, loss_type, max_steps):
    """
    T-SPIN's up to iteration 1, with its third side. That of IRIS at a first step, where all its weights are alike, so
    that the mean of expectations over micro-batches is the expectation over the batch.
    """
    settings = {"loss_type": loss_type, "num_iterations": 2, "num_history_iterations": 0, "max_steps": max_steps}
    settings |= {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "train_sampling_strategy": "random"}
    states = []
    for size, steps in ((8, 1), (2, 4)):
        divided = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = build_trainer(16, output_dir=str(tmp_path / str(size)), **settings, **divided)
        start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.train()
        assert trainer.state.global_step == max_steps
        states.append({name: value - start[name] for name, value in trainer.model.state_dict().items()})
    moved = max(change.abs().max().item() for change in states[0].values())
    assert moved > 1e-4
    for name, change in states[0].items():
        torch.testing.assert_close(states[1][name], change, atol=1e-3 * moved, rtol=0)
