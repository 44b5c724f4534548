"""Whole runs whose pairs rewards choose: what is trained on, what is kept and told, and what stops and resumes them."""

import json

import pytest
from conftest import DATA, trained
from stopping import assert_same_weights, weights
from test_distributed import launch

from spin_trl import SPINTrainer, load_pairs
from spin_trl.data.pair_dataset import TRUTH
from spin_trl.data.pairs import NoPairsError
from spin_trl.generation.sampler import Completion, OpponentSampler
from spin_trl.run_directory.run_paths import RunDirectoryError


NUM_ROWS = 8


class Letters(OpponentSampler):
    """Answers with a letter for each sample, another one in every iteration; rewards can be read from it."""

    reads_checkpoints = False

    def __init__(self, tokenizer):
        self.ids = tokenizer.convert_tokens_to_ids(["a", "b", "c", "d", "e", "f"])
        self.iteration = 0
        self.num_asked = 0

    def sample(self, requests, params, logprobs=False):
        for request in requests:
            self.num_asked += 1
            yield Completion(
                request.key, [self.ids[3 * self.iteration + request.key[1]], params.end_token_ids[0]], "stop"
            )

    def publish(self, iteration, checkpoint, earlier=None):
        self.iteration = iteration


class Rewards:
    """Rewards by text; the ground truth's row by row. Counts its calls and fails in one of them."""

    def __init__(self, by_text: dict[str, float], truths: list[float], fails_in: int = -1):
        self.by_text = by_text
        self.truths = truths
        self.fails_in = fails_in
        self.calls = []

    def __call__(self, prompts, completions, ground_truth, number, **kwargs):
        if len(self.calls) == self.fails_in:
            self.fails_in = -1
            raise ZeroDivisionError("the judge is out")
        self.calls.append((completions, number))
        return [
            self.truths[row] if text == truth else self.by_text[text]
            for text, truth, row in zip(completions, ground_truth, number, strict=True)
        ]


@pytest.fixture
def make_trainer(build_trainer, train_dataset, tokenizer):
    def make(reward_funcs, numbers=range(NUM_ROWS), **overrides) -> SPINTrainer:
        data = train_dataset.select(range(NUM_ROWS)).add_column("number", list(numbers))
        settings = {"num_iterations": 2, "resume": "auto", "save_strategy": "epoch", "num_generations": 2}
        arguments = {"train_dataset": data, "reward_funcs": reward_funcs, "sampler": Letters(tokenizer)}
        return build_trainer(NUM_ROWS, **arguments, **{**settings, **overrides})

    return make


def own(trainer: SPINTrainer, iteration: int) -> list[dict]:
    pairs = load_pairs(trainer.args.output_dir, iteration)
    return [pair for pair in pairs if pair["iteration"] == iteration]


def test_best_answers_take_the_ground_truths_place_and_history_remembers_it(make_trainer, tokenizer):
    """
    Iteration 0 answers a (0.2) and b (0.6), iteration 1 d (0.0) and e (0.1); the truths of rows 0 and 1 have 0.5, the
    others 1.0. So in iteration 0 two prompts choose b over a and over the truth.
    """
    rewards = Rewards({"a": 0.2, "b": 0.6, "d": 0.0, "e": 0.1}, [0.5, 0.5] + [1.0] * 6)
    trainer = trained(make_trainer(rewards, pairing="best_of"))
    first = own(trainer, 0)
    expected = [(row, 1, sample) for row in (0, 1) for sample in (0, TRUTH)]
    expected += [(row, TRUTH, sample) for row in range(2, NUM_ROWS) for sample in (0, 1)]
    assert [(pair["row"], pair["chosen_sample"], pair["sample"]) for pair in first] == expected
    truths = trainer.store.read_data()["chosen_ids"][:]
    for pair in first:
        for side, sample in (("chosen", pair["chosen_sample"]), ("rejected", pair["sample"])):
            answer = [Letters(tokenizer).ids[sample], tokenizer.eos_token_id], [0.2, 0.6][sample]
            truth = truths[pair["row"]], rewards.truths[pair["row"]]
            assert (pair[f"{side}_ids"], pair[f"{side}_reward"]) == (truth if sample == TRUTH else answer)
    second = load_pairs(trainer.args.output_dir, 1)
    assert second["iteration"][:] == [1] * 16 + [0] * 16
    names = [name for name in first[0] if not name.startswith("ref_")]
    assert second.select(range(16, 32)).select_columns(names).to_list() == [{n: p[n] for n in names} for p in first]

    metrics = trainer.store.read_metrics(0)
    assert metrics["truth_reward"] == pytest.approx(7 / 8) and metrics["generation_reward"] == pytest.approx(0.4)
    assert (metrics["beaten_truths_share"], metrics["tied_truths_share"]) == (0.25, 0.0)
    assert (metrics["num_pairs"], metrics["num_training_pairs"], metrics["no_pair_share"]) == (16, 16, 0.0)
    logged = [entry for entry in trainer.state.log_history if "self_play/beaten_truths_share" in entry]
    assert [entry["self_play/beaten_truths_share"] for entry in logged] == [0.25, 0.0]
    of_truths = [pair for pair in first if TRUTH in (pair["chosen_sample"], pair["sample"])]
    logps = [p["ref_chosen_logps" if p["chosen_sample"] == TRUTH else "ref_rejected_logps"] for p in of_truths]
    num_tokens = sum(len(truths[pair["row"]]) for pair in of_truths)
    assert metrics["opponent_nll"] == pytest.approx(-sum(logps) / num_tokens)


def test_generations_are_ranked_until_rewards_find_no_difference_where_a_run_may_end(make_trainer, capsys):
    """In iteration 1 all answers are equal where the rule looks at them, so nothing is left to train on."""
    rewards = Rewards({"a": 0.2, "b": 0.6, "d": 0.5, "e": 0.5}, [9.0] * NUM_ROWS)
    settings = {"pairing": "reward_ranked", "num_history_iterations": 0}
    trainer = make_trainer(rewards, **settings)
    with pytest.raises(NoPairsError, match="all generations of each prompt .* same reward.*`stop_when_converged=True`"):
        trainer.train()
    sides = [(pair["row"], pair["chosen_sample"], pair["sample"]) for pair in own(trainer, 0)]
    assert sides == [(row, 1, 0) for row in range(NUM_ROWS)]
    assert trainer.state.global_step == 1  # 8 pairs in a batch of 8
    assert {"opponent_nll", "logps_gap"} & set(trainer.store.read_metrics(0)) == set()
    make_trainer(rewards, **settings, stop_when_converged=True).train()
    found = trainer.store.read_run()["converged"]
    assert (found["rule"], found["iteration"], found["no_pair_share"]) == ("equal rewards", 1, 1.0)
    assert "with `pairing='reward_ranked'`, 100.0% of prompts make no pair" in capsys.readouterr().out


def test_rewards_are_only_logged_where_the_ground_truth_is_always_chosen(make_trainer, tmp_path):
    rewards = Rewards({"a": 0.2, "b": 0.6, "d": 0.0, "e": 0.1}, [0.5] * NUM_ROWS)

    def second(completions, **kwargs):
        return [None if text == "a" else 1.0 for text in completions]

    judged = trained(make_trainer([rewards, second], reward_weights=[1.0, 0.1]))
    trained(make_trainer(None, output_dir=str(tmp_path / "plain")))
    assert "chosen_sample" not in judged.store.read_pairs(0).column_names
    for iteration in (0, 1):
        expected = load_pairs(tmp_path / "plain", iteration)
        found = load_pairs(judged.args.output_dir, iteration)
        assert found.select_columns(expected.column_names)[:] == expected[:]
    assert [(p["chosen_reward"], p["rejected_reward"]) for p in own(judged, 0)[:2]] == [(0.6, 0.2), (0.6, 0.7)]
    metrics = judged.store.read_metrics(0)
    assert metrics["rewards/Rewards/truths"] == pytest.approx(0.5)
    assert metrics["rewards/Rewards/generations"] == pytest.approx(0.4)
    assert metrics["rewards/second/generations"] == 1.0  # of b alone


def test_run_stopped_by_a_reward_function_goes_on_with_the_completions_that_are_there(make_trainer, tmp_path):
    """It fails in iteration 1, in the call for the generations. With other rewards it does not go on."""
    by_text = {"a": 0.2, "b": 0.6, "d": 0.0, "e": 0.7}
    settings, truths = {"pairing": "best_of"}, [0.5] * NUM_ROWS
    whole = trained(make_trainer(Rewards(by_text, truths), output_dir=str(tmp_path / "whole"), **settings))

    trainer = make_trainer(Rewards(by_text, truths, fails_in=4), **settings)  # tried, then two each
    with pytest.raises(ZeroDivisionError, match="the judge is out") as error:
        trainer.train()
    assert any("In the reward function `Rewards`." in note for note in error.value.__notes__)
    assert not list(trainer.store.path(1).glob("*answers*"))
    again = trained(make_trainer(Rewards(by_text, truths), **settings))
    assert again.game.opponents.sampler.num_asked == 0
    for iteration in (0, 1):
        one, other = (load_pairs(run.args.output_dir, iteration)[:] for run in (whole, again))
        assert one == other
    assert_same_weights(again, weights(whole))

    def another(completions, **kwargs):
        return [0.0] * len(completions)

    rewards, corrected = Rewards(by_text, truths), [*range(NUM_ROWS - 1), 0]
    with pytest.raises(RunDirectoryError, match=r"`reward_functions`: \['Rewards'\] there, \['another'\] now"):
        make_trainer(another, **settings)
    with pytest.raises(RunDirectoryError, match="`pairing`: 'best_of' there, 'ground_truth' now"):
        make_trainer(rewards)
    with pytest.raises(RunDirectoryError, match=r"`data.reward_checksum`: '\w+' there, '\w+' now"):
        make_trainer(rewards, corrected, **settings)


def test_ground_truths_that_nobody_judges_or_the_first_opponent_beats_are_a_warning(make_trainer, caplog):
    """Three have no reward and make no pair, and the answer b beats the others."""
    trainer = trained(
        make_trainer(Rewards({"a": 0.2, "b": 0.6}, [None] * 3 + [0.0] * 5), pairing="best_of", num_iterations=1)
    )
    assert {pair["row"] for pair in own(trainer, 0)} == set(range(3, NUM_ROWS))
    metrics = trainer.store.read_metrics(0)
    assert (metrics["no_pair_share"], metrics["unjudged_share"]) == (3 / NUM_ROWS, 3 / (3 * NUM_ROWS))
    assert "No reward function judges 12.5% of the ground truths and generations of iteration 0" in caplog.text
    assert "The first opponent already beats 62.5% of the ground truths, which will be rejected" in caplog.text


@pytest.mark.slow
def test_two_processes_train_on_the_pairs_that_one_of_them_judged(tiny_model, tmp_path):
    """Short answers are better, and four preferences join: the data's 30 prompts, two generations each."""
    output_dir = tmp_path / "out"
    arguments = [tiny_model, str(DATA / "accent_train.jsonl"), str(output_dir), "--pairing", "best_of"]
    arguments += ["--num_generations", "2", "--temperature", "1.0", "--num_iterations", "1"]
    arguments += ["--learning_rate", "1e-3", "--beta", "0.1"]
    done = launch("ddp", tmp_path, arguments)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    first, second = (json.loads((output_dir / f"seen-{rank}.json").read_text()) for rank in range(2))
    assert first["logged"] == second["logged"]
    pairs = load_pairs(output_dir, 0)
    own = [pair for pair in pairs if pair["iteration"] == 0]
    metrics = json.loads((output_dir / "iteration-0" / "metrics.json").read_text())
    rows = {pair["row"] for pair in own}
    assert set(pairs["row"]) - rows == {-1, -2, -3, -4}
    assert rows < set(range(30)) and len(rows) == round(30 * (1 - metrics["no_pair_share"])) > 20
    assert all(pair["chosen_reward"] > pair["rejected_reward"] for pair in own)
    assert {pair["chosen_sample"] for pair in own} >= {TRUTH, 0, 1}
