"""Numbers and the best iteration on two processes."""

import json

import pytest
from conftest import DATA
from test_distributed import launch
from transformers import AutoModelForCausalLM


TRAIN_FILE = DATA / "accent_train.jsonl"
BEST = ["--metric_for_best_iteration", "nll", "--load_best_iteration_at_end", "true"]


@pytest.mark.slow
def test_every_process_logs_the_same_numbers_and_has_the_best_policy(tiny_model, tmp_path):
    """The least negative log-likelihood is the start's: a policy that the last step has left behind."""
    output_dir = tmp_path / "out"
    arguments = [tiny_model, str(TRAIN_FILE), str(output_dir), *BEST]
    done = launch("ddp", tmp_path, arguments)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    first, second = (json.loads((output_dir / f"seen-{rank}.json").read_text()) for rank in range(2))
    assert first["logged"] == second["logged"]
    assert json.loads((output_dir / "self_play.json").read_text())["best_iteration"]["after"] == "start"
    start = {n: p.double().sum().item() for n, p in AutoModelForCausalLM.from_pretrained(tiny_model).named_parameters()}
    for seen in (first, second):
        assert seen["policy"] == pytest.approx(start, abs=1e-9)
    last = json.loads((output_dir / "iteration-2" / "metrics.json").read_text())["evaluation"]
    assert 0 <= last["rewards/accuracies"] <= 1
    assert done.stdout.count("The start is the best by `nll`") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero3", "fsdp2"])
def test_policy_in_shards_is_refused_before_it_is_loaded(tiny_model, tmp_path, name):
    arguments = [tiny_model, str(TRAIN_FILE), str(tmp_path / "out"), *BEST]
    done = launch(name, tmp_path, arguments + (["--use_cpu", "false"] if name == "fsdp2" else []))
    assert done.returncode != 0
    assert "under ZeRO-3 and FSDP each process holds only shards of it" in done.stderr
    assert not (tmp_path / "out" / "iteration-0").exists()
