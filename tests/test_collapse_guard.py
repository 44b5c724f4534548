"""A run in which a sign of collapse is seen: it says so, ends, or goes back, as asked. The signs are put in."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file

from spin_trl import SPINTrainer
from spin_trl.evaluation import collapse_guard
from spin_trl.evaluation.collapse import CollapseSign


SIGN = CollapseSign("displacement", "Both sides sink by 0.5 nats a token.")


@pytest.fixture
def see(monkeypatch):
    """Have one of the two looks see a sign, at the `number`-th time that it is taken."""

    def put(look: str, number: int) -> None:
        taken = []

        def judge(*args):
            taken.append(args)
            sign = SIGN if len(taken) == number else None
            return sign if look == "sign_within" else [] if sign is None else [sign]

        monkeypatch.setattr(collapse_guard, look, judge)

    return put


@pytest.fixture
def play(tiny_model, train_dataset, eval_dataset, make_config):
    def play(adapter: bool = False, evaluates: bool = False, **overrides) -> SPINTrainer:
        settings = {"num_iterations": 3, "save_strategy": "epoch", "resume": "auto", "identical_pairs": "keep"}
        trainer = SPINTrainer(
            tiny_model,
            make_config(**{**settings, **overrides}),
            train_dataset=train_dataset.select(range(16)),
            eval_dataset=eval_dataset if evaluates else None,
            peft_config=LoraConfig(r=4, target_modules="all-linear") if adapter else None,
        )
        trainer.train()
        return trainer

    return play


def weights_of(trainer: SPINTrainer) -> dict[str, torch.Tensor]:
    model = trainer.model
    return get_peft_model_state_dict(model) if hasattr(model, "peft_config") else model.state_dict()


def assert_is(trainer: SPINTrainer, folder: Path) -> None:
    saved = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    weights = weights_of(trainer)
    assert saved.keys() <= weights.keys()
    assert all(torch.equal(weights[name], value) for name, value in saved.items())


@pytest.mark.parametrize("look", ["sign_within", "signs_between"])
def test_a_warning_names_sign_cause_and_remedy_and_the_run_goes_on(look, see, play, caplog):
    see(look, 1)
    trainer = play()
    assert trainer.run.iteration == 2
    (warning,) = [record.message for record in caplog.records if "collapse" in record.message]
    assert "Sign of collapse after iteration 0: Both sides sink by 0.5 nats a token." in warning
    assert all(word in warning for word in ("`learning_rate`", "`beta`", "[sigmoid, sft]", "space"))
    metrics = [trainer.store.read_metrics(iteration) for iteration in (1, 2)]
    assert metrics[0]["collapse_signs"] == {"displacement": SIGN.numbers}
    assert [found["num_collapse_signs"] for found in metrics] == [1, 0]
    logged = {e["self_play/iteration"]: e for e in trainer.state.log_history if "self_play/num_collapse_signs" in e}
    assert {iteration: entry["self_play/num_collapse_signs"] for iteration, entry in logged.items()} == {
        0: 0,
        1: 1,
        2: 0,
    }
    assert "collapsed" not in trainer.store.read_run()


def test_run_in_which_nothing_is_seen_says_nothing(play, caplog, monkeypatch):
    monkeypatch.setattr("spin_trl.evaluation.collapse._MAX_FALL", 1e9)
    monkeypatch.setattr("spin_trl.evaluation.collapse._MAX_NLL_GROWTH", 1e9)
    monkeypatch.setattr("spin_trl.evaluation.collapse._MAX_FACTOR", 1e9)
    trainer = play(num_iterations=2, on_collapse="stop")
    assert "Sign of collapse" not in caplog.text and trainer.run.iteration == 1
    assert trainer.store.read_metrics(1)["num_collapse_signs"] == 0


@pytest.mark.parametrize(
    ("reference", "starts_at_zero"),
    [
        ({}, [True, True, True]),
        ({"opponent_reference": "fixed"}, [True, False, False]),
        ({"reference_mixture_alpha": 0.5}, [True, False, False]),
    ],
    ids=["previous", "fixed", "mixture"],
)
def test_training_is_judged_by_its_own_steps(play, monkeypatch, reference, starts_at_zero):
    judged = []
    monkeypatch.setattr(collapse_guard, "sign_within", lambda *args: judged.append(args))
    trainer = play(num_history_iterations=1, logging_steps=1, beta=[0.1, 0.2, 0.3], **reference)
    steps = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    seen, betas, lengths, starts = zip(*judged, strict=True)
    assert [len(one) for one in seen] == [2, 4, 4]
    assert [entry for one in seen for entry in one] == steps
    assert betas == (0.1, 0.2, 0.3)
    assert set(lengths) == {trainer.store.read_metrics(0)["chosen_length"]}
    assert list(starts) == starts_at_zero


@pytest.mark.parametrize("look", ["sign_within", "signs_between"])
def test_stop_ends_the_run_with_the_policy_as_it_is_and_a_second_start_leaves_it_so(look, see, play, capsys):
    see(look, 2)
    trainer = play(on_collapse="stop")
    assert trainer.run.iteration == 1 and trainer.state.global_step == 2 + 4
    found = trainer.store.read_run()
    assert found["finished"] and found["collapsed"]["iteration"] == 2 and "returned_to" not in found["collapsed"]
    assert "Self-play ends before iteration 2 (`on_collapse='stop'`). Sign of" in capsys.readouterr().out
    assert not trainer.store.has_pairs(2)

    again = play(on_collapse="stop")
    assert again.state.global_step == 6
    assert "To play on all the same, set `on_collapse='warn'`." in capsys.readouterr().out
    assert_is(again, trainer.store.checkpoints()[0])
    assert play(on_collapse="warn").run.iteration == 2


@pytest.mark.parametrize(
    ("look", "number", "adapter", "evaluates"),
    [("sign_within", 2, False, False), ("signs_between", 2, True, True), ("sign_within", 3, True, False)],
)
def test_rollback_leaves_the_policy_of_before_the_sign(look, number, adapter, evaluates, see, play, capsys):
    see(look, number)
    trainer = play(adapter, evaluates, on_collapse="rollback")
    good = trainer.store.path(number - 1, "opponent")
    assert_is(trainer, good)
    with pytest.raises(AssertionError):
        assert_is(trainer, trainer.store.checkpoints()[0])  # what training had come to
    found = trainer.store.read_run()["collapsed"]
    assert (found["iteration"], found["returned_to"], found["rule"]) == (number, number - 1, "displacement")
    assert f"The policy is again the opponent of iteration {number - 1}" in capsys.readouterr().out

    again = play(adapter, evaluates, on_collapse="rollback")
    assert_is(again, good)
    assert f"its final policy is the opponent of iteration {number - 1}" in capsys.readouterr().out


def test_best_iteration_wins_over_the_one_to_go_back_to(see, play, monkeypatch):
    see("sign_within", 2)
    settings = {"metric_for_best_iteration": "nll", "load_best_iteration_at_end": True, "on_collapse": "rollback"}
    trainer = play(False, True, **settings)
    best = trainer.store.read_run()["best_iteration"]["opponent"]
    assert_is(trainer, trainer.store.path(best, "opponent"))
    assert trainer.store.read_metrics(2)["evaluation"].keys() >= {"nll"}  # what is judged has been evaluated


def test_sign_in_the_last_training_is_kept_with_the_final_evaluation_if_there_is_one(see, play, caplog):
    see("sign_within", 1)
    trainer = play(num_iterations=1, evaluates=True)
    kept = json.loads(trainer.store.path(1, "metrics.json").read_text())
    assert kept["collapse_signs"] == {"displacement": SIGN.numbers} and kept["num_collapse_signs"] == 1
    see("sign_within", 1)
    trainer = play(num_iterations=1, overwrite_output_dir=True)
    assert trainer.store.iterations() == [0]
    assert caplog.text.count("Sign of collapse after iteration 0: ") == 2
