"""Whole runs with T-SPIN: what each pair is compared with, its loss, and that a run goes on with the same answers."""

import shutil

import pytest
import torch
from conftest import BeforeFirstSteps, all_completions, logp
from peft import LoraConfig
from stopping import assert_same_weights, stop_after, weights
from transformers import TrainerCallback

from spin_trl import SPINTrainer, load_pairs
from spin_trl.run_directory.store import IterationStore, RunDirectoryError


@pytest.fixture
def make_trainer(build_trainer):
    """Sixteen prompts: two steps in iteration 0, then with history four in each of two."""

    def make(*callbacks, **overrides) -> SPINTrainer:
        fields = {"num_iterations": 3, "loss_type": "t_spin", "save_strategy": "steps", "save_steps": 100}
        fields |= {"resume": "auto", "learning_rate": 1e-2, "t_spin_beta": 0.5}
        arguments = {"peft_config": LoraConfig(r=4, target_modules="all-linear"), "callbacks": list(callbacks)}
        return build_trainer(16, **arguments, **{**fields, **overrides})

    return make


def of_initial_answers(model, pairs) -> torch.Tensor:
    """The log-probs of the initial answers, where there are any."""
    return torch.tensor([logp(model, row["prompt_ids"], row["initial_ids"]) for row in pairs if "initial_ids" in row])


def logistic(t: torch.Tensor) -> torch.Tensor:
    return -torch.nn.functional.logsigmoid(t)


def test_first_step_of_every_iteration_has_the_loss_of_its_pairs_and_iteration_0s_answers(make_trainer):
    """A step takes all 64 pairs (16 prompts, two answers, two iterations); iteration 0's 32 pairs fill it twice."""
    trainer = make_trainer(per_device_train_batch_size=64, num_generations=2)
    opponents = BeforeFirstSteps(trainer, of_initial_answers)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == len(opponents.found) == 3
    first = all_completions(trainer.store, 0).to_pylist()
    answers = {(row["row"], row["sample"]): row["completion_ids"] for row in first}
    for iteration, loss in enumerate(losses):
        pairs = load_pairs(trainer.args.output_dir, iteration)
        assert ("initial_ids" in pairs.column_names) == (iteration > 0)
        assert all(pair["initial_ids"] == answers[pair["row"], pair["sample"]] for pair in pairs if iteration > 0)
        chosen, rejected = (torch.tensor(pairs[f"ref_{side}_logps"][:]) for side in ("chosen", "rejected"))
        expected = logistic(chosen - rejected)
        if iteration > 0:
            expected = expected + 0.5 * logistic(rejected - opponents.found[iteration])
        assert loss == pytest.approx(expected.mean().item(), rel=1e-4), iteration


def test_without_a_second_term_nothing_is_kept_and_no_third_side_computed(make_trainer):
    trainer = make_trainer(t_spin_beta=0.0, num_iterations=2)
    trainer.train()
    assert not trainer.store.initial_answers.rows.exists
    assert "initial_ids" not in load_pairs(trainer.args.output_dir, 1).column_names


# Going on


def test_stopped_run_goes_on_to_the_same_policy_with_initial_answers_that_are_made_again(make_trainer, tmp_path):
    """Stopped in iteration 2."""
    undisturbed = make_trainer(output_dir=str(tmp_path / "undisturbed"))
    undisturbed.train()
    stopped = stop_after(make_trainer, 8, save_steps=1)
    assert stopped.run.iteration == 2
    kept, generations = stopped.store.initial_answers.rows.path, stopped.store.path(0, "generations")
    expected = (kept / "rows.arrow").read_bytes()
    shutil.rmtree(kept)
    moved = generations.rename(tmp_path / "moved")
    resumed = make_trainer(save_steps=1)
    with pytest.raises(RunDirectoryError, match="`loss_type` compares with.*generations, .* to 0 of the 16"):
        resumed.train()
    moved.rename(generations)
    resumed.train()
    assert (kept / "rows.arrow").read_bytes() == expected
    assert_same_weights(resumed, weights(undisturbed))


class RemovesInitialAnswers(TrainerCallback):
    """In iteration 0, after they were written."""

    def on_step_end(self, args, state, control, **kwargs):
        shutil.rmtree(IterationStore(args.output_dir).initial_answers.rows.path, ignore_errors=True)


def test_initial_answers_that_vanish_while_a_run_goes_on_are_missed_before_it_trains_without_them(make_trainer):
    trainer = make_trainer(RemovesInitialAnswers(), num_iterations=2)
    with pytest.raises(RunDirectoryError, match="initial_answers is gone.*Start the same command again"):
        trainer.train()
    assert trainer.state.global_step == 2
