"""Whole runs with T-SPIN: what each pair is compared with, its loss, and that a run goes on with the same answers."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import all_completions, read_rows
from datasets import Dataset
from kill_points import PLACES
from peft import LoraConfig
from stopping import assert_same_weights, stop_after, weights
from test_kill_and_resume import assert_ends_the_same, choose_kill, start
from transformers import TrainerCallback

from spin_trl import SPINTrainer, load_pairs
from spin_trl.run_directory.store import IterationStore, RunDirectoryError


@pytest.fixture
def make_trainer(tiny_model, make_config):
    """Sixteen prompts: two steps in iteration 0, then with history four in each of two."""

    def make(*callbacks, adapter="lora", **overrides) -> SPINTrainer:
        fields = {"num_iterations": 3, "loss_type": "t_spin", "save_strategy": "steps", "save_steps": 100}
        fields |= {"resume": "auto", "learning_rate": 1e-2 if adapter == "lora" else 1e-3, "t_spin_beta": 0.5}
        return SPINTrainer(
            tiny_model,
            make_config(**{**fields, **overrides}),
            train_dataset=Dataset.from_list(read_rows("accent_train.jsonl", 16)),
            peft_config=LoraConfig(r=4, target_modules="all-linear") if adapter == "lora" else None,
            callbacks=list(callbacks),
        )

    return make


class LogProbsOfInitialAnswers(TrainerCallback):
    """At the first step of each iteration, when the policy is the opponent: its log-probs of the initial answers."""

    def __init__(self):
        self.trainer: SPINTrainer | None = None
        self.found: list[torch.Tensor] = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.trainer.run.place.first_step and self.trainer.run.iteration > 0:
            rows = self.trainer.store.read_pairs(self.trainer.run.iteration)
            self.found.append(torch.tensor([logp(model, row["prompt_ids"], row["initial_ids"]) for row in rows]))


def logp(model, prompt_ids: list[int], completion_ids: list[int]) -> float:
    ids = torch.tensor([prompt_ids + completion_ids])
    with torch.no_grad():
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    return logps[len(prompt_ids) - 1 :].sum().item()


def logistic(t: torch.Tensor) -> torch.Tensor:
    return -torch.nn.functional.logsigmoid(t)


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_first_step_of_every_iteration_has_the_loss_of_its_pairs_under_the_opponent(make_trainer, adapter):
    """A step takes all 64 pairs (16 prompts, two answers, two iterations); iteration 0's 32 pairs fill it twice."""
    watch = LogProbsOfInitialAnswers()
    trainer = make_trainer(watch, adapter=adapter, per_device_train_batch_size=64, num_generations=2)
    watch.trainer = trainer
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and len(watch.found) == 2
    for iteration, loss in enumerate(losses):
        pairs = load_pairs(trainer.args.output_dir, iteration)
        chosen, rejected = (torch.tensor(pairs[f"ref_{side}_logps"][:]) for side in ("chosen", "rejected"))
        expected = logistic(chosen - rejected)
        if iteration > 0:
            expected = expected + 0.5 * logistic(rejected - watch.found[iteration - 1])
        assert loss == pytest.approx(expected.mean().item(), rel=1e-4), iteration


def test_pairs_of_every_later_iteration_carry_iteration_0s_answer(make_trainer):
    trainer = make_trainer(num_generations=2)
    trainer.train()
    store = trainer.store
    first = all_completions(store, 0).to_pylist()
    answers = {(row["row"], row["sample"]): row["completion_ids"] for row in first}
    assert "initial_ids" not in load_pairs(store.output_dir, 0).column_names
    for iteration in (1, 2):
        pairs = load_pairs(store.output_dir, iteration)
        assert len(pairs) == 64 and set(pairs["iteration"][:]) == {iteration - 1, iteration}
        for pair in pairs:
            assert pair["initial_ids"] == answers[pair["row"], pair["sample"]]
            assert pair["iteration"] > 0 or pair["rejected_ids"] == pair["initial_ids"]
    assert any(pair["rejected_ids"] != pair["initial_ids"] for pair in load_pairs(store.output_dir, 2))


def test_without_a_second_term_nothing_is_kept_and_no_third_side_computed(make_trainer):
    trainer = make_trainer(t_spin_beta=0.0, num_iterations=2)
    trainer.train()
    assert not trainer.store.initial_answers.rows.exists
    assert "initial_ids" not in load_pairs(trainer.args.output_dir, 1).column_names


# Going on


@pytest.mark.parametrize(("adapter", "step"), [("lora", 8), ("full", 5)])
def test_stopped_run_goes_on_to_the_same_policy(make_trainer, tmp_path, adapter, step):
    """Stopped in iteration 2 and in iteration 1."""
    undisturbed = make_trainer(adapter=adapter, output_dir=str(tmp_path / "undisturbed"))
    undisturbed.train()
    stopped = stop_after(make_trainer, step, adapter=adapter, save_steps=1)
    assert stopped.run.iteration == {8: 2, 5: 1}[step]
    resumed = make_trainer(adapter=adapter, save_steps=1)
    resumed.train()
    assert_same_weights(resumed, weights(undisturbed))


def test_initial_answers_that_are_gone_are_made_again_and_if_they_cannot_be_the_run_is_refused(make_trainer, tmp_path):
    stopped = stop_after(make_trainer, 3, save_steps=1, num_iterations=2)  # in iteration 1
    kept, generations = stopped.store.initial_answers.rows.path, stopped.store.path(0, "generations")
    expected = (kept / "rows.arrow").read_bytes()
    shutil.rmtree(kept)
    moved = generations.rename(tmp_path / "moved")
    with pytest.raises(RunDirectoryError, match="`loss_type` compares with.*generations, .* to 0 of the 16"):
        make_trainer(num_iterations=2).train()
    moved.rename(generations)
    make_trainer(num_iterations=2).train()
    assert (kept / "rows.arrow").read_bytes() == expected


class RemovesInitialAnswers(TrainerCallback):
    """In iteration 0, after they were written."""

    def on_step_end(self, args, state, control, **kwargs):
        shutil.rmtree(IterationStore(args.output_dir).initial_answers.rows.path, ignore_errors=True)


def test_initial_answers_that_vanish_while_a_run_goes_on_are_missed_before_it_trains_without_them(make_trainer):
    trainer = make_trainer(RemovesInitialAnswers(), num_iterations=2)
    with pytest.raises(RunDirectoryError, match="initial_answers is gone.*Start the same command again"):
        trainer.train()
    assert trainer.state.global_step == 2


KILLED = {"use_vllm": False, "loss_type": "t_spin", "t_spin_beta": 0.5}


@pytest.fixture(scope="module")
def undisturbed(tiny_model, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert start(tiny_model, output_dir, KILLED) == 0
    return output_dir


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["score", "train"])
def test_killed_run_ends_as_the_undisturbed_one(tiny_model, undisturbed, tmp_path, phase):
    kill_at = choose_kill(json.loads((undisturbed / PLACES).read_text()), phase)
    assert start(tiny_model, tmp_path / "run", KILLED, kill_at) == -signal.SIGKILL
    assert start(tiny_model, tmp_path / "run", KILLED) == 0
    assert_ends_the_same(tmp_path / "run", undisturbed)
    assert IterationStore(tmp_path / "run").initial_answers.rows.exists
