"""Which iteration is the best, and its policy back at the end of the run."""

import math
import shutil

import pytest
import torch
from conftest import trained
from peft import LoraConfig
from safetensors.torch import load_file

from spin_trl import SPINTrainer
from spin_trl.evaluation.best_iteration import find_best
from spin_trl.run_directory.store import RunDirectoryError


# Choosing


def evaluations(*values: float | None, metric: str = "nll"):
    return [(i, {"evaluation": {} if v is None else {metric: v}}) for i, v in enumerate(values)]


@pytest.mark.parametrize(
    ("metric", "values", "overrides", "best"),
    [
        ("nll", [3.0, 1.0, 2.0], {}, 1),
        ("eval_nll", [3.0, 1.0, 2.0], {}, 1),
        ("nll", [3.0, 1.0, 2.0], {"greater_is_better": True}, 0),
        ("rewards/rejected", [0.3, 0.1, 0.2], {}, 1),
        ("my_loss", [0.3, 0.1, 0.2], {}, 1),
        ("rewards/margins", [None, 0.2, 0.1], {}, 1),
        ("right", [0.1, 0.3, 0.3], {}, 1),
        ("right", [0.1, 0.2, 0.3], {"greater_is_better": False}, 0),
        ("right", [0.1, math.nan, math.inf], {}, 0),
    ],
)
def test_best_iteration_by_hand(metric, values, overrides, best, make_config):
    """Which way is better is told, known, or follows from the metric's name."""
    metrics = evaluations(*values, metric=metric.removeprefix("eval_"))
    args = make_config(metric_for_best_model=metric, **overrides)
    assert find_best(metrics, args).opponent == best


def test_best_iteration_is_named_with_all_numbers_where_any_has_a_value(make_config):
    args = make_config(metric_for_best_model="nll")
    assert str(find_best(evaluations(3.0, 1.0, 2.0), args)) == (
        "The policy after iteration 0 is the best by `nll`: start 3.0000, iteration 0 1.0000, iteration 1 2.0000."
    )
    assert str(find_best(evaluations(1.0, 2.0), args)).startswith("The start is the best by `nll`")
    assert find_best([*evaluations(None, math.nan), (2, {})], args) is None


# Loading


@pytest.fixture
def make(build_trainer, eval_dataset):
    """A trainer whose metric `score` takes the values one after the other."""

    def build(*scores: float, adapter: bool = True, **settings) -> SPINTrainer:
        left = list(scores)
        settings = {"num_iterations": 2, "metric_for_best_model": "score", "load_best_model_at_end": True} | settings
        arguments = {"eval_dataset": eval_dataset, "compute_generation_metrics": lambda *_: {"score": left.pop(0)}}
        return build_trainer(16, peft_config=LoraConfig(r=4) if adapter else None, **arguments, **settings)

    return build


def saved(directory) -> dict[str, torch.Tensor]:
    (file,) = directory.glob("*.safetensors")
    return load_file(file)


def assert_is(trainer: SPINTrainer, iteration: int, tmp_path) -> None:
    """The policy is that opponent, in memory and as saved."""
    trainer.save_model(str(tmp_path / "final"))
    expected = saved(trainer.store.path(iteration, "opponent"))
    for found in (dict(trainer.model.named_parameters()), saved(tmp_path / "final")):
        found = {name.replace(".default", ""): tensor for name, tensor in found.items()}
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("adapter", "scores", "best"),
    [(False, (0, 2, 1), 1), (True, (2, 1, 0), 0), (False, (0, 1, 2), 2)],
    ids=["full, first", "lora, start", "full, last"],
)
def test_best_iterations_policy_is_restored_and_named(make, tmp_path, capsys, adapter, scores, best):
    trainer = trained(make(*scores, adapter=adapter))
    assert_is(trainer, best, tmp_path)
    chosen, *others = (saved(trainer.store.path(i, "opponent")) for i in sorted(range(3), key=lambda i: i != best))
    assert all(any(not torch.equal(other[name], chosen[name]) for name in chosen) for other in others)
    found = trainer.store.read_run()["best_iteration"]
    assert (found["opponent"], found["metric"], list(found["values"].values())) == (best, "score", list(scores))
    printed = capsys.readouterr().out
    assert "is the best by `score`: start" in printed and "The policy is again the opponent of iteration" in printed


def test_best_iteration_is_named_without_being_loaded(make, capsys):
    trainer = make(1, 0, num_iterations=1, load_best_model_at_end=False)
    before = {name: tensor.clone() for name, tensor in trainer.model.named_parameters()}
    trainer.train()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in trainer.model.named_parameters())
    assert not trainer.store.path(1, "opponent").exists()
    assert "The start is the best by `score`" in capsys.readouterr().out


def test_metric_that_the_users_function_does_not_return_ends_the_run_at_the_first_evaluation(make):
    trainer = make(0.5, metric_for_best_model="scrore")
    with pytest.raises(ValueError, match=r"'scrore'` is none of the evaluation's metrics: \['score', 'nll'"):
        trainer.train()
    assert not trainer.store.has_pairs(0)


def test_resumed_and_finished_runs_restore_it_too(make, tmp_path):
    """Stopped before the final evaluation; then complete, and started once more."""
    settings = {"save_strategy": "epoch", "save_total_limit": 1, "resume": "auto"}
    with pytest.raises(IndexError):  # no third score
        make(0, 2, **settings).train()
    resumed = trained(make(1, **settings))
    assert_is(resumed, 1, tmp_path)
    again = trained(make(**settings))
    assert_is(again, 1, tmp_path)
    assert again.store.read_run()["best_iteration"]["values"] == {"start": 0, "iteration 0": 2, "iteration 1": 1}
    shutil.rmtree(again.store.path(1, "opponent"))
    with pytest.raises(RunDirectoryError, match="opponent, the policy to return to, is not there"):
        make(**settings).train()
