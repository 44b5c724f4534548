"""A run that ends because the opponent cannot be told from the data any more."""

import pytest
from conftest import trained

from spin_trl import SPINConfig, SPINTrainer
from spin_trl.data.pairs import NoPairsError
from spin_trl.evaluation.endings import Converged, check_evaluation, check_identical_share, check_no_pair_share
from spin_trl.generation.sampler import Completion, OpponentSampler


def config(**overrides) -> SPINConfig:
    return SPINConfig(use_cpu=True, bf16=False, report_to="none", **{"stop_when_converged": True, **overrides})


@pytest.mark.parametrize("accuracy", [0.5, 0.485, 0.515])
def test_accuracy_near_a_half_is_the_end(accuracy):
    with pytest.raises(Converged, match=r"before iteration 3: .*after iteration 2 .* within 2.0%") as end:
        check_evaluation(3, {"rewards/accuracies": accuracy}, config())
    described = end.value.describe()
    assert (described["iteration"], described["rule"], described["accuracy"]) == (3, "held-out accuracy", accuracy)


def test_share_of_identical_pairs_within_the_tolerance_of_one_is_the_end():
    with pytest.raises(Converged, match="reproduces the ground truth in 99.0% of the pairs, at least 98.0%"):
        check_identical_share(1, 0.99, config())


def test_nothing_ends_a_run_that_is_outside_the_limits_or_not_to_be_ended():
    for scores in ({"rewards/accuracies": 0.55}, {"rewards/accuracies": 0.45}, {"nll": 0.5}):
        check_evaluation(3, scores, config())
    check_identical_share(1, 0.97, config())
    check_evaluation(3, {"rewards/accuracies": 0.5}, config(stop_when_converged=False))
    check_identical_share(1, 1.0, config(stop_when_converged=False))


@pytest.mark.parametrize("pairing", ["best_of", "reward_ranked"])
def test_where_rewards_choose_telling_the_ground_truth_is_no_measure_and_making_no_pairs_is(pairing):
    args = config(pairing=pairing, num_generations=2)
    check_evaluation(3, {"rewards/accuracies": 0.5}, args)
    check_identical_share(3, 1.0, args)
    check_no_pair_share(3, 0.97, args)
    with pytest.raises(Converged, match=f"with `pairing='{pairing}'`, 99.0% of prompts make no pair"):
        check_no_pair_share(3, 0.99, args)


class LearnsTheTruth(OpponentSampler):
    """Says nothing up to an iteration, and from it on the ground truth."""

    reads_checkpoints = False

    def __init__(self, iteration: int):
        self.truths = {}
        self.learned_at = iteration
        self.iteration = 0

    def sample(self, requests, params, logprobs=False):
        for request in requests:
            knows = self.iteration >= self.learned_at
            yield Completion(request.key, self.truths[request.key[0]] if knows else [params.end_token_ids[0]], "stop")

    def publish(self, iteration, checkpoint, earlier=None):
        self.iteration = iteration


@pytest.fixture
def make_trainer(build_trainer):
    """48 rows in batches of 8: six steps in iteration 0."""

    def make(learned_at: int, **overrides) -> SPINTrainer:
        settings = {"stop_when_converged": True, "identical_pairs": None, "resume": "auto", "save_strategy": "epoch"}
        sampler = LearnsTheTruth(learned_at)
        trainer = build_trainer(sampler=sampler, **{**settings, **overrides})
        data = trainer.plan.data.train
        sampler.truths = dict(zip(data["row"], data["chosen_ids"], strict=True))
        return trainer

    return make


def test_run_ends_when_all_answers_equal_the_ground_truth_and_says_so_when_it_is_started_again(make_trainer, capsys):
    trainer = trained(make_trainer(1))
    assert trainer.state.global_step == 6
    assert not trainer.store.has_pairs(1) and not trainer.store.path(2).exists()
    found = trainer.store.read_run()["converged"]
    assert (found["iteration"], found["rule"], found["identical_share"]) == (1, "identical pairs", 1.0)
    reason = "before iteration 1: its opponent reproduces the ground truth in 100.0% of the pairs"
    assert reason in capsys.readouterr().out
    assert any(entry.get("self_play/identical_share") == 1.0 for entry in trainer.state.log_history)

    again = trained(make_trainer(1, num_iterations=5))
    assert again.state.global_step == 6
    assert f"final policy is checkpoint-6. Self-play has converged {reason}" in capsys.readouterr().out

    with pytest.raises(NoPairsError):  # the rule as it is without the option
        make_trainer(1, stop_when_converged=False).train()


def test_run_whose_first_opponent_knows_everything_ends_before_its_first_step(make_trainer, capsys):
    for _ in range(2):
        trainer = trained(make_trainer(0))
        assert trainer.state.global_step == 0
        assert "converged before iteration 0" in capsys.readouterr().out


def test_held_out_accuracy_ends_the_run_after_the_evaluation_and_the_best_iteration_is_still_told(
    play_run, eval_dataset
):
    """A policy that does not move tells nothing apart."""
    settings = {"stop_when_converged": True, "metric_for_best_model": "nll", "load_best_model_at_end": True}
    trainer = play_run(8, eval_dataset=eval_dataset, learning_rate=1e-12, **settings)
    found = trainer.store.read_run()
    assert (found["converged"]["rule"], found["converged"]["accuracy"]) == ("held-out accuracy", 0.5)
    assert list(found["best_iteration"]["values"]) == ["start", "iteration 0"]
    assert not list(trainer.store.path(1).glob("generations/*"))
