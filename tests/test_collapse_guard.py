"""A run in which self-play makes the policy worse: it says so, ends, or goes back, as asked. Large steps do it here."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file

from spin_trl import SPINTrainer
from spin_trl.evaluation.collapse import Collapsed, CollapseGuard
from spin_trl.run_directory.store import IterationStore


HEALTHY, COLLAPSING = 1e-6, 1e-2  # learning rates


@pytest.fixture
def play(play_run, eval_dataset):
    def play(bad: int | None, adapter: bool = False, evaluates: bool = False, **overrides) -> SPINTrainer:
        """Play three iterations, in one of which (`bad`) both sides sink by more than a nat a token."""
        num_iterations = overrides.pop("num_iterations", 3)
        rates = [HEALTHY] * num_iterations
        if bad is not None:
            rates[bad] = COLLAPSING * (10 if adapter else 1)
        settings = {"save_strategy": "epoch", "resume": "auto", "num_history_iterations": 0, "temperature": 0}
        settings |= {"num_iterations": num_iterations, "learning_rate": rates, **overrides}
        lora = LoraConfig(r=4, target_modules="all-linear") if adapter else None
        return play_run(16, eval_dataset=eval_dataset if evaluates else None, peft_config=lora, **settings)

    return play


def assert_is(trainer: SPINTrainer, folder: Path) -> None:
    saved = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    model = trainer.model
    weights = get_peft_model_state_dict(model) if hasattr(model, "peft_config") else model.state_dict()
    assert saved.keys() <= weights.keys()
    assert all(torch.equal(weights[name], value) for name, value in saved.items())


@pytest.mark.parametrize(
    ("logging_steps", "sign"),
    [pytest.param(1, "displacement", id="training"), pytest.param(1000, "unlikely_truths", id="opponent")],
)
def test_a_warning_names_sign_cause_and_remedy_and_the_run_goes_on(logging_steps, sign, play, caplog):
    """It is seen in the training's own log, or, where that has nothing, in what the opponent answers."""
    trainer = play(0, num_iterations=2, logging_steps=logging_steps)
    assert trainer.run.iteration == 1 and "collapsed" not in trainer.store.read_run()
    warnings = [record.message for record in caplog.records if "Sign of collapse after iteration 0: " in record.message]
    assert all(word in warnings[0] for word in ("`learning_rate`", "`beta`", "[sigmoid, sft]", "space"))
    first, second = (trainer.store.read_metrics(iteration) for iteration in (0, 1))
    assert first["num_collapse_signs"] == 0 and sign in second["collapse_signs"]
    assert second["num_collapse_signs"] == len(second["collapse_signs"]) == len(warnings)
    logged = [e["self_play/num_collapse_signs"] for e in trainer.state.log_history if "self_play/num_pairs" in e]
    assert logged == [0, len(warnings)]


def test_run_in_which_nothing_is_seen_says_nothing(play, caplog):
    trainer = play(None, num_iterations=2, on_collapse="stop")
    assert "Sign of collapse" not in caplog.text and trainer.run.iteration == 1
    assert trainer.store.read_metrics(1)["num_collapse_signs"] == 0


@pytest.mark.parametrize(
    ("reference", "is_seen"),
    [({}, True), ({"reference_mixture_alpha": 0.5}, False)],
    ids=["opponent", "mixture"],
)
def test_training_is_judged_by_its_own_steps_beta_and_reference(make_config, tmp_path, reference, is_seen):
    """
    The policy falls in iteration 0, and does not move in iteration 1, where it is 0.3 below the initial policy.

    With that as the reference there is no fall; with the opponent as reference it fell by 0.3 / 0.2 / 10 nats a token.
    """
    store = IterationStore(tmp_path / "run")
    for iteration in (0, 1, 2):
        store.write_metrics(iteration, {"chosen_length": 10.0})
    numbers = [(0.5, 0.0, 0.0), (1.0, -0.9, -2.0), (1.5, -0.3, -1.0), (2.0, -0.3, -1.0)]
    log = [{"epoch": e, "rewards/chosen": c, "rewards/rejected": r, "rewards/margins": c - r} for e, c, r in numbers]
    args = make_config(num_iterations=3, beta=[0.1, 0.2, 0.3], on_collapse="stop", **reference)
    guard = CollapseGuard(args, store, lambda: log)
    guard.look_at_training(0)  # nothing has been trained
    with pytest.raises(Collapsed, match=r"lost 0.90 nats a token"):
        guard.look_at_training(1)
    with pytest.raises(Collapsed, match=r"lost 0.15 nats a token") if is_seen else nullcontext():
        guard.look_at_training(2)


@pytest.mark.parametrize(
    ("pairing", "signs"), [("best_of", set()), ("ground_truth", {"negative_gap", "unlikely_truths"})]
)
def test_ground_truths_of_other_prompts_are_no_sign_of_collapse(make_config, tmp_path, pairing, signs):
    """Where rewards choose, `opponent_nll` and `logps_gap` are of the prompts that make a pair, not always the same."""
    store = IterationStore(tmp_path / "run")
    for iteration, change in ((0, 0.0), (1, 9.0)):
        store.write_metrics(iteration, {"opponent_nll": 1.0 + change, "logps_gap": -change})
    CollapseGuard(make_config(pairing=pairing), store, list).look_at_opponent(1)
    assert store.read_metrics(1).get("collapse_signs", {}).keys() == signs


def test_stop_ends_the_run_with_the_policy_as_it_is_and_a_second_start_leaves_it_so(play, capsys):
    trainer = play(1, on_collapse="stop")
    assert trainer.run.iteration == 1 and not trainer.store.has_pairs(2)
    found = trainer.store.read_run()
    assert found["finished"] and found["collapsed"]["iteration"] == 2 and "returned_to" not in found["collapsed"]
    assert "displacement" in found["collapsed"]["rule"]
    assert "Self-play ends before iteration 2 (`on_collapse='stop'`). Sign of" in capsys.readouterr().out

    again = play(1, on_collapse="stop")
    assert again.state.global_step == 4
    assert "To play on all the same, set `on_collapse='warn'`." in capsys.readouterr().out
    assert_is(again, trainer.store.checkpoints()[0])
    assert play(1, on_collapse="warn").run.iteration == 2


@pytest.mark.parametrize(
    ("bad", "adapter", "evaluates"), [(1, False, True), (2, True, False)], ids=["full", "lora, in the last iteration"]
)
def test_rollback_leaves_the_policy_of_before_the_sign(bad, adapter, evaluates, play, capsys):
    trainer = play(bad, adapter, evaluates, on_collapse="rollback")
    good = trainer.store.path(bad, "opponent")
    assert_is(trainer, good)
    with pytest.raises(AssertionError):
        assert_is(trainer, trainer.store.checkpoints()[0])  # what training had come to
    found = trainer.store.read_run()["collapsed"]
    assert (found["iteration"], found["returned_to"]) == (bad + 1, bad)
    assert f"The policy is again the opponent of iteration {bad}" in capsys.readouterr().out

    again = play(bad, adapter, evaluates, on_collapse="rollback")
    assert_is(again, good)
    assert f"its final policy is the opponent of iteration {bad}" in capsys.readouterr().out


def test_best_iteration_wins_over_the_one_to_go_back_to(play):
    """Asked for the highest `nll`, the collapsed policy is the best; the run would go back to the start."""
    best = {"metric_for_best_model": "nll", "greater_is_better": True, "load_best_model_at_end": True}
    trainer = play(0, evaluates=True, on_collapse="rollback", **best)
    found = trainer.store.read_run()
    assert (found["best_iteration"]["opponent"], found["collapsed"]["returned_to"]) == (1, 0)
    assert_is(trainer, trainer.store.path(1, "opponent"))


def test_sign_in_the_last_training_is_kept_with_the_final_evaluation_if_there_is_one(play, caplog):
    trainer = play(0, num_iterations=1, evaluates=True)
    assert trainer.store.read_metrics(1)["collapse_signs"].keys() == {"displacement"}
    trainer = play(0, num_iterations=1, overwrite_output_dir=True)
    assert trainer.store.iterations() == [0]
    assert caplog.text.count("Sign of collapse after iteration 0: ") == 2
