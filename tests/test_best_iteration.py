"""Which iteration is the best, and its policy back at the end of the run."""

import math
import shutil

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from spin_trl import SPINConfig, SPINTrainer
from spin_trl.evaluation.best_iteration import find_best, is_greater_better
from spin_trl.run_directory.store import RunDirectoryError


# Choosing


def config(metric: str, **overrides) -> SPINConfig:
    return SPINConfig(use_cpu=True, bf16=False, report_to="none", metric_for_best_model=metric, **overrides)


def evaluations(*values: float | None, metric: str = "nll"):
    return [(i, {"evaluation": {} if v is None else {metric: v}}) for i, v in enumerate(values)]


@pytest.mark.parametrize(
    ("metric", "values", "overrides", "best"),
    [
        ("nll", [3.0, 1.0, 2.0], {}, 1),
        ("eval_nll", [3.0, 1.0, 2.0], {}, 1),
        ("right", [0.1, 0.2, 0.3], {}, 2),
        ("right", [0.1, 0.2, 0.3], {"greater_is_better": False}, 0),
        ("right", [0.1, 0.3, 0.3], {}, 1),
        ("right", [0.1, math.nan, math.inf], {}, 0),
        ("rewards/margins", [None, 0.2, 0.1], {}, 1),
    ],
)
def test_best_iteration_by_hand(metric, values, overrides, best):
    metrics = evaluations(*values, metric=metric.removeprefix("eval_"))
    assert find_best(metrics, config(metric, **overrides)).opponent == best


def test_no_iteration_is_the_best_where_none_has_a_value():
    assert find_best([*evaluations(None, math.nan), (2, {})], config("nll")) is None


def test_best_iteration_is_named_with_all_numbers():
    best = find_best(evaluations(3.0, 1.0, 2.0), config("nll"))
    assert str(best) == (
        "The policy after iteration 0 is the best by `nll`: start 3.0000, iteration 0 1.0000, iteration 1 2.0000."
    )
    assert str(find_best(evaluations(1.0, 2.0), config("nll"))).startswith("The start is the best by `nll`")


def test_which_way_is_better_is_known_or_follows_from_the_name():
    smaller = [name for name in ("nll", "rewards/rejected", "my_loss", "rewards/accuracies", "accuracy")]
    assert [is_greater_better(name) for name in smaller] == [False, False, False, True, True]
    assert is_greater_better("nll", True) and not is_greater_better("accuracy", False)


# Refusals


def test_metric_that_the_users_function_does_not_return_ends_the_run_at_the_first_evaluation(
    tiny_model, make_config, train_dataset, eval_dataset
):
    trainer = SPINTrainer(
        tiny_model,
        make_config(metric_for_best_model="accurracy"),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        compute_generation_metrics=lambda *_: {"accuracy": 0.5},
    )
    with pytest.raises(ValueError, match=r"'accurracy'` is none of the evaluation's metrics: \['accuracy', 'nll'"):
        trainer.train()
    assert not trainer.store.has_pairs(0)


# Loading


def score_of(*values: float):
    """A metric that takes these values one after the other."""
    left = list(values)
    return lambda *_: {"score": left.pop(0)}


def make(tiny_model, train_dataset, eval_dataset, config, compute, adapter) -> SPINTrainer:
    return SPINTrainer(
        tiny_model,
        config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        compute_generation_metrics=compute,
        peft_config=LoraConfig(r=4) if adapter else None,
    )


def saved(trainer: SPINTrainer, directory, adapter: bool) -> dict[str, torch.Tensor]:
    return load_file(directory / ("adapter_model.safetensors" if adapter else "model.safetensors"))


def assert_is(trainer: SPINTrainer, iteration: int, adapter: bool, tmp_path) -> None:
    """The policy is that opponent, in memory and as saved."""
    trainer.save_model(str(tmp_path / "final"))
    expected = saved(trainer, trainer.store.path(iteration, "opponent"), adapter)
    for found in (dict(trainer.model.named_parameters()), saved(trainer, tmp_path / "final", adapter)):
        found = {name.replace(".default", ""): tensor for name, tensor in found.items()}
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


SETTINGS = {"num_iterations": 2, "metric_for_best_model": "score", "load_best_model_at_end": True}


@pytest.mark.parametrize(
    ("adapter", "scores", "best"),
    [(True, (0, 2, 1), 1), (False, (0, 2, 1), 1), (True, (2, 1, 0), 0), (False, (0, 1, 2), 2)],
    ids=["lora, first", "full, first", "lora, start", "full, last"],
)
def test_best_iterations_policy_is_restored_and_named(
    tiny_model, train_dataset, eval_dataset, make_config, tmp_path, capsys, adapter, scores, best
):
    trainer = make(tiny_model, train_dataset, eval_dataset, make_config(**SETTINGS), score_of(*scores), adapter)
    trainer.train()
    assert_is(trainer, best, adapter, tmp_path)
    others = [saved(trainer, trainer.store.path(i, "opponent"), adapter) for i in range(3) if i != best]
    chosen = saved(trainer, trainer.store.path(best, "opponent"), adapter)
    assert all(any(not torch.equal(other[name], chosen[name]) for name in chosen) for other in others)
    found = trainer.store.read_run()["best_iteration"]
    assert (found["opponent"], found["metric"], list(found["values"].values())) == (best, "score", list(scores))
    printed = capsys.readouterr().out
    assert "is the best by `score`: start" in printed and "The policy is again the opponent of iteration" in printed


def test_best_iteration_is_named_without_being_loaded(tiny_model, train_dataset, eval_dataset, make_config, capsys):
    configuration = make_config(num_iterations=1, metric_for_best_model="score")
    trainer = make(tiny_model, train_dataset, eval_dataset, configuration, score_of(1, 0), True)
    before = {name: tensor.clone() for name, tensor in trainer.model.named_parameters()}
    trainer.train()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in trainer.model.named_parameters())
    assert not trainer.store.path(1, "opponent").exists()
    assert "The start is the best by `score`" in capsys.readouterr().out


def test_resumed_and_finished_runs_restore_it_too(tiny_model, train_dataset, eval_dataset, make_config, tmp_path):
    """Stopped before the final evaluation; then complete, and started once more."""
    settings = {**SETTINGS, "save_strategy": "epoch", "save_total_limit": 1, "resume": "auto"}

    def start(*scores):
        return make(tiny_model, train_dataset, eval_dataset, make_config(**settings), score_of(*scores), True)

    with pytest.raises(IndexError):  # no third score
        start(0, 2).train()
    resumed = start(1)
    resumed.train()
    assert_is(resumed, 1, True, tmp_path)
    again = start()
    again.train()
    assert_is(again, 1, True, tmp_path)
    assert again.store.read_run()["best_iteration"]["values"] == {"start": 0, "iteration 0": 2, "iteration 1": 1}
    shutil.rmtree(again.store.path(1, "opponent"))
    with pytest.raises(RunDirectoryError, match="opponent, the policy to return to, is not there"):
        start().train()
