"""Learning rates, beta and moments of each iteration in a plain run, and what is refused. Others: test_distributed."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from spin_trl.policy.optimizer import check_schedule


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


class WatchGroups(TrainerCallback):
    """Learning rate of every parameter group at every step."""

    def __init__(self):
        self.rates = []

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def test_each_iteration_has_its_own_peak_warmup_and_beta_and_the_run_says_which(play_run):
    """48 pairs in batches of 8 are 6 steps, then with history 12; a third of them is 2 and 4."""
    schedules = {"learning_rate": [1e-3, 4e-4], "beta": [1.0, 1e-9]}
    trainer = play_run(num_iterations=2, warmup_steps=1 / 3, **schedules)

    def curve(peak, num_steps, warmup):
        return [peak * min(k / warmup, (num_steps - k) / (num_steps - warmup)) for k in range(num_steps)]

    assert logged(trainer, "learning_rate") == pytest.approx(curve(1e-3, 6, 2) + curve(4e-4, 12, 4))
    margins = logged(trainer, "rewards/margins")  # of rewards, which beta scales
    assert max(map(abs, margins[1:6])) > 1e-2
    assert 0 < max(map(abs, margins[7:])) < 1e-6
    written = json.loads((trainer.store.output_dir / "self_play.json").read_text())["config"]
    assert {name: written[name] for name in schedules} == schedules


def test_schedule_with_a_minimum_keeps_it_in_every_iteration(play_run):
    """`min_lr` is absolute: the cosine ends at it whatever the peak."""
    trainer = play_run(
        num_iterations=2,
        learning_rate=[1e-3, 1e-4],
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 5e-5},
        num_history_iterations=0,
    )
    for iteration, peak in enumerate([1e-3, 1e-4]):
        last = 5e-5 + (peak - 5e-5) * (1 + math.cos(math.pi * 5 / 6)) / 2  # the sixth of six steps
        assert logged(trainer, "learning_rate")[6 * iteration + 5] == pytest.approx(last)


def test_groups_of_a_passed_optimizer_keep_their_ratio(play_run, tiny_model):
    """Groups at 1e-3 and 1e-4; the second iteration has a tenth of the first one's learning rate."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW([{"params": weights[:3], "lr": 1e-3}, {"params": weights[3:], "lr": 1e-4}])
    arguments = {"model": model, "optimizers": (optimizer, None), "callbacks": [watch := WatchGroups()]}
    play_run(**arguments, num_iterations=2, learning_rate=[1e-3, 1e-4], num_history_iterations=0)
    assert watch.rates[0] == pytest.approx([1e-3, 1e-4])
    assert watch.rates[6] == pytest.approx([1e-4, 1e-5])


def test_passed_scheduler_runs_once_through_all_iterations_and_the_run_says_so(play_run, tiny_model, caplog):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizers = optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    trainer = play_run(model=model, optimizers=optimizers, num_iterations=2, num_history_iterations=0)
    assert "runs once through all iterations" in caplog.text
    assert logged(trainer, "learning_rate") == [0.5] * 12


@pytest.mark.parametrize("optim", ["adagrad", "schedule_free_adamw", "galore_adamw_layerwise", "adalomo"])
def test_optimizer_whose_moments_cannot_be_emptied_is_refused(make_config, optim):
    with pytest.raises(ValueError, match=f"`optim='{optim}'`.*`reset_optimizer=False`"):
        check_schedule(make_config(optim=optim), None, None)
    check_schedule(make_config(optim=optim, reset_optimizer=False), None, None)
    check_schedule(make_config(optim=optim, num_iterations=1), None, None)
