"""Rewards on held-out data: the policy after an iteration against the opponent it was trained against."""

import json

import numpy as np
import pytest
import torch
from conftest import read_rows
from datasets import Dataset
from transformers import AutoModelForCausalLM

from spin_trl import SPINTrainer
from spin_trl.evaluation.held_out import reward_metrics
from spin_trl.evaluation.metric_names import EVALUATION_METRICS


REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")


def test_rewards_by_hand():
    """Rewards 1, -1, 2, 0 against 0, 1, 2, 0.5; the third pair ties, the fourth is identical: (1 + 0 + .5 + .5) / 4."""
    chosen, rejected = np.array([2.0, -2.0, 4.0, 0.0]), np.array([0.0, 2.0, 4.0, 1.0])
    found = reward_metrics(chosen, rejected, np.array([False, False, False, True]), beta=0.5)
    assert found == pytest.approx(
        {
            "rewards/chosen": 2 / 4,
            "rewards/rejected": 3.5 / 4,
            "rewards/accuracies": 0.5,
            "rewards/margins": -1.5 / 4,
        }
    )


def logp(model, prompt_ids: list[int], completion_ids: list[int]) -> float:
    ids = torch.tensor([prompt_ids + completion_ids])
    with torch.no_grad():
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    return logps[len(prompt_ids) - 1 :].sum().item()


def greedy(model, prompt_ids: list[int], end: int) -> list[int]:
    ids = model.generate(torch.tensor([prompt_ids]), do_sample=False, max_new_tokens=12, pad_token_id=end)[0].tolist()
    return ids[len(prompt_ids) :]


def test_rewards_are_of_the_next_policy_against_the_opponent_with_the_iterations_beta(
    tiny_model, train_dataset, eval_dataset, make_config
):
    """Recomputed from the saved opponents, by plain transformers: nothing of a later or earlier one slips in."""
    betas = [0.5, 2.0]
    config = make_config(
        num_iterations=2, beta=betas, load_best_model_at_end=True, metric_for_best_model="nll"
    )  # which saves every opponent
    trainer = SPINTrainer(tiny_model, config, train_dataset=train_dataset, eval_dataset=eval_dataset)
    trainer.train()
    models = [AutoModelForCausalLM.from_pretrained(trainer.store.path(i, "opponent")) for i in range(3)]
    end = trainer.processing_class.eos_token_id
    for iteration, beta in enumerate(betas):
        chosen, rejected = [], []
        for row in trainer.game.plan.data.eval:
            prompt_ids = row["prompt_ids"]
            answer = greedy(models[iteration], prompt_ids, end)
            for side, rewards in ((row["chosen_ids"], chosen), (answer, rejected)):
                before, after = (logp(models[i], prompt_ids, side) for i in (iteration, iteration + 1))
                rewards.append(beta * (after - before))
        evaluation = trainer.store.read_metrics(iteration + 1)["evaluation"]
        assert evaluation["rewards/chosen"] == pytest.approx(np.mean(chosen), abs=1e-3)
        assert evaluation["rewards/rejected"] == pytest.approx(np.mean(rejected), abs=1e-3)
        assert evaluation["rewards/margins"] == pytest.approx(np.mean(chosen) - np.mean(rejected), abs=1e-3)
        assert evaluation["rewards/accuracies"] == np.mean(np.array(chosen) > np.array(rejected))
    assert not set(REWARDS) & set(trainer.store.read_metrics(0)["evaluation"])


def broken_after(calls: int, error: Exception):
    seen = []

    def compute(prompts, references, generations):
        seen.append(prompts)
        if len(seen) > calls:
            raise error
        return {"right": 0.5}

    return compute


def test_metrics_function_that_fails_ends_the_run_with_its_error_and_what_to_do(
    tiny_model, train_dataset, eval_dataset, make_config
):
    trainer = SPINTrainer(
        tiny_model,
        make_config(num_iterations=1),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        compute_generation_metrics=broken_after(0, KeyError("answer")),
    )
    with pytest.raises(KeyError, match="answer") as failure:
        trainer.train()
    (note,) = failure.value.__notes__
    assert "`compute_generation_metrics`, for the opponent of iteration 0" in note and "resume the run" in note


def test_users_metric_may_not_take_the_name_of_one_of_the_runs(tiny_model, train_dataset, eval_dataset, make_config):
    trainer = SPINTrainer(
        tiny_model,
        make_config(num_iterations=1),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        compute_generation_metrics=lambda *_: {"nll": 1.0, "right": 0.5},
    )
    with pytest.raises(ValueError, match=r"returned \['nll'\], which are names of the run's own metrics"):
        trainer.train()


def test_run_that_failed_in_the_users_metrics_goes_on_from_there(
    tiny_model, train_dataset, eval_dataset, make_config, tmp_path
):
    """It failed at the start of iteration 1, whose opponent is judged by the log-probs of the one before: on disk."""

    def play(folder: str, compute) -> SPINTrainer:
        config = make_config(
            output_dir=str(tmp_path / folder), num_iterations=2, temperature=0, save_strategy="epoch", resume="auto"
        )
        trainer = SPINTrainer(
            tiny_model,
            config,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_generation_metrics=compute,
        )
        trainer.train()
        return trainer

    with pytest.raises(ZeroDivisionError):
        play("stopped", broken_after(1, ZeroDivisionError()))
    undisturbed, again = (play(folder, lambda *_: {"right": 0.5}) for folder in ("undisturbed", "stopped"))
    for iteration in (1, 2):
        found, expected = (run.store.read_metrics(iteration)["evaluation"] for run in (again, undisturbed))
        assert found == expected and set(found) == {*EVALUATION_METRICS, "right"}


def test_evaluation_data_of_one_row_is_enough(tiny_model, train_dataset, make_config):
    rows = read_rows("accent_test.jsonl", 1)
    trainer = SPINTrainer(
        tiny_model, make_config(num_iterations=1), train_dataset=train_dataset, eval_dataset=Dataset.from_list(rows)
    )
    trainer.train()
    assert json.dumps(trainer.store.read_metrics(1)["evaluation"])
