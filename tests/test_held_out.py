"""Rewards on held-out data: the policy after an iteration against the opponent it was trained against."""

import json

import numpy as np
import pytest
import torch
from conftest import completion_table, logp
from datasets import Dataset
from transformers import AutoModelForCausalLM

from spin_trl import SPINTrainer
from spin_trl.evaluation.held_out import ScoreTable, generation_metrics, reward_metrics
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


def greedy(model, prompt_ids: list[int], end: int) -> list[int]:
    ids = model.generate(torch.tensor([prompt_ids]), do_sample=False, max_new_tokens=12, pad_token_id=end)[0].tolist()
    return ids[len(prompt_ids) :]


def test_rewards_are_of_the_next_policy_against_the_opponent_with_the_iterations_beta(play_run, eval_dataset):
    """Recomputed from the saved opponents, by plain transformers: nothing of a later or earlier one slips in."""
    betas = [0.5, 2.0]
    saves_every_opponent = {"load_best_model_at_end": True, "metric_for_best_model": "nll"}
    trainer = play_run(eval_dataset=eval_dataset, num_iterations=2, beta=betas, **saves_every_opponent)
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


def test_run_that_failed_in_the_users_metrics_says_what_to_do_and_goes_on_from_there(play_run, eval_dataset, tmp_path):
    """It failed at the start of iteration 1, whose opponent is judged by the log-probs of the one before: on disk."""

    def play(folder: str, compute) -> SPINTrainer:
        settings = {"num_iterations": 2, "temperature": 0, "save_strategy": "epoch", "resume": "auto"}
        arguments = {"eval_dataset": eval_dataset, "compute_generation_metrics": compute}
        return play_run(16, output_dir=str(tmp_path / folder), **settings, **arguments)

    once = [0.5]
    with pytest.raises(IndexError) as failure:
        play("stopped", lambda *_: {"right": once.pop()})
    (note,) = failure.value.__notes__
    assert "`compute_generation_metrics`, for the opponent of iteration 1" in note and "resume the run" in note
    undisturbed, again = (play(folder, lambda *_: {"right": 0.5}) for folder in ("undisturbed", "stopped"))
    for iteration in (1, 2):
        found, expected = (run.store.read_metrics(iteration)["evaluation"] for run in (again, undisturbed))
        assert found == expected and set(found) == {*EVALUATION_METRICS, "right"}


def test_data_of_one_row_are_enough(play_run, eval_dataset):
    trainer = play_run(1, eval_dataset=eval_dataset.select([0]), num_iterations=1)
    assert json.dumps(trainer.store.read_metrics(1)["evaluation"])


# The user's metrics, and the table that shows them


def evaluate(tokenizer, compute, truths: dict[int, str], answers: dict[int, str]) -> dict[str, float]:
    """The metrics of texts by their rows, each encoded with an end token."""

    def encode(texts: dict[int, str]) -> list[list[int]]:
        return [
            tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in texts.values()
        ]

    prompts = [f"prompt {row}" for row in truths]
    dataset = Dataset.from_dict({"row": list(truths), "prompt": prompts, "chosen_ids": encode(truths)})
    completions = completion_table([(row, 0) for row in answers], encode(answers))
    return generation_metrics(compute, dataset, [completions], tokenizer)


def test_metrics_get_prompts_references_and_generations_of_the_same_row_without_special_tokens(tokenizer):
    """The dataset may be in another order than the completions, which come sorted by row. Numbers become floats."""
    seen = []

    def compute(prompts, references, generations):
        seen.append((prompts, references, generations))
        return {"count": 2, "share": np.float32(0.5)}

    found = evaluate(tokenizer, compute, {3: "AA", 1: "B", 2: "CH D"}, {1: "B", 2: "D", 3: "EH"})
    assert found == {"count": 2.0, "share": 0.5} and {type(value) for value in found.values()} == {float}
    assert seen == [(["prompt 1", "prompt 2", "prompt 3"], ["B", "CH D", "AA"], ["B", "D", "EH"])]


@pytest.mark.parametrize("returned", [None, 0.5, {"accuracy": "0.5"}, {"accuracy": [0.5]}], ids=str)
def test_anything_but_a_dict_of_numbers_is_refused(tokenizer, returned):
    with pytest.raises(TypeError, match="`compute_generation_metrics` must return a dict of numbers") as refusal:
        evaluate(tokenizer, lambda *_: returned, {0: "B"}, {0: "B"})
    assert repr(returned) in str(refusal.value)


def test_users_metric_may_not_take_the_name_of_one_of_the_runs(tokenizer):
    with pytest.raises(ValueError, match=r"returned \['nll'\], which are names of the run's own metrics"):
        evaluate(tokenizer, lambda *_: {"nll": 1.0, "right": 0.5}, {0: "B"}, {0: "B"})


def test_table_grows_by_one_aligned_line_as_each_opponent_is_evaluated():
    """A score that is missing leaves its cell empty."""
    lines = []
    table = ScoreTable(lines.append)
    table.add("start", {"nll": 2.0, "a_rather_long_name": 41.5})
    assert len(lines) == 2
    table.add("iteration 10", {"nll": 1.5, "a_rather_long_name": 1234.25})
    table.add("iteration 11", {"a_rather_long_name": 0.5})
    assert lines == [
        "after                  nll  a_rather_long_name",
        "start               2.0000             41.5000",
        "iteration 10        1.5000           1234.2500",
        "iteration 11                            0.5000",
    ]
