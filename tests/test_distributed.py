"""Schedules, moments and references in a plain run, in two processes, and sharded by DeepSpeed and FSDP2."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import DATA, RECIPES, ROOT
from play_distributed import play, settings
from transformers import AutoModelForCausalLM

from spin_trl import SPINConfig, load_pairs


ACCELERATE = RECIPES / "accelerate"
TRAIN_FILE = DATA / "accent_train.jsonl"
slow = pytest.mark.slow

# (accelerate configuration or None for this process, opponent_reference, class that wraps the policy)
RUNS = [
    pytest.param((None, "previous", "LlamaForCausalLM"), id="plain"),
    pytest.param(("ddp", "previous", "DistributedDataParallel"), id="ddp"),
    pytest.param(("zero3", "fixed", "DeepSpeedEngine"), id="zero3-fixed"),
    pytest.param(("zero3", "previous", "DeepSpeedEngine"), id="zero3", marks=slow),
    pytest.param(("zero2", "fixed", "DeepSpeedEngine"), id="zero2-fixed", marks=slow),
    pytest.param(("fsdp2", "previous", "FSDPLlamaForCausalLM"), id="fsdp2", marks=slow),
    pytest.param(("fsdp2", "fixed", "FSDPLlamaForCausalLM"), id="fsdp2-fixed", marks=slow),
]


def launch(name: str, folder, arguments: list[str], **variables: str) -> subprocess.CompletedProcess:
    """Run `play_distributed.py` under a recipe's configuration, on two CPU processes."""
    config = yaml.safe_load((ACCELERATE / f"{name}.yaml").read_text())
    config |= {"use_cpu": True, "num_processes": 2, "mixed_precision": "no"}
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate.yaml")]
    command += ["--main_process_port", "0", str(ROOT / "tests" / "play_distributed.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    launcher = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
    try:
        stdout, stderr = launcher.communicate(timeout=540)  # DeepSpeed compiles at first use, which may take minutes
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)  # its processes too
    return subprocess.CompletedProcess(command, launcher.returncode, stdout, stderr)


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory, tiny_model):
    """What every process saw, the run's directory, and its parameters."""
    name, reference, wrapper = request.param
    folder = tmp_path_factory.mktemp("run")
    output_dir = folder / "out"
    if name is None:
        config = SPINConfig(**settings(str(output_dir), opponent_reference=reference))
        return [play(tiny_model, str(TRAIN_FILE), config)], output_dir, request.param
    arguments = [tiny_model, str(TRAIN_FILE), str(output_dir), "--opponent_reference", reference]
    if name == "fsdp2":
        arguments += ["--use_cpu", "false"]  # see `let_fsdp_run_on_cpu`
    done = launch(name, folder, arguments)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    seen = [json.loads((output_dir / f"seen-{rank}.json").read_text()) for rank in range(2)]
    assert [process["num_processes"] for process in seen] == [2, 2]
    return seen, output_dir, request.param


def expected_rates(peak: float, num_steps: int) -> list[float]:
    """Linear warm-up over a quarter of the steps, then linear decay to 0: k/w up to step w, (n-k)/(n-w) from there."""
    warmup = num_steps / 4
    return [peak * min(k / warmup, (num_steps - k) / (num_steps - warmup)) for k in range(num_steps)]


def test_every_step_has_the_learning_rate_of_its_iterations_own_curve(run):
    """30 pairs in batches of 8 are 4 steps, then with history 60 are 8."""
    expected = expected_rates(1e-3, 4) + expected_rates(2e-4, 8)
    for seen in run[0]:
        assert seen["learning_rate"] == pytest.approx(expected)
        for number, step in enumerate(seen["begins"]):
            assert step["rates"] == pytest.approx([expected[number]] * len(step["rates"])), number


def test_moments_are_fresh_at_the_first_step_of_every_iteration(run):
    for seen in run[0]:
        assert seen["wrapper"] == run[2][2]
        assert [seen["begins"][step]["moment"] for step in (0, 4)] == [0, 0]
        assert min(step["moment"] for step in seen["ends"][1:4] + seen["ends"][5:]) > 0
        assert [step["adam_step"] for step in seen["ends"]] == [1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7, 8]


def test_policy_equals_the_reference_where_the_reference_is_the_opponent(run):
    """log 2 at the first step of both iterations, or, if the reference stays the initial model, of the first only."""
    for seen in run[0]:
        assert seen["loss"][0] == pytest.approx(math.log(2), abs=1e-6)
        moves_on = run[2][1] == "previous"
        assert (abs(seen["loss"][4] - math.log(2)) < 1e-6) is moves_on


def test_beta_is_the_last_iterations_at_the_end(run):
    assert [seen["beta"] for seen in run[0]] == [0.5] * len(run[0])


def test_every_prompt_is_paired_once_and_scored_by_the_reference(run, tiny_model):
    _, output_dir, (_, reference, _) = run
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for iteration in (0, 1):
        pairs = load_pairs(output_dir, iteration)
        assert sorted(pairs["row"][:30]) == list(range(30))
        expected = [logp(model, row["prompt_ids"], row["rejected_ids"]) for row in pairs]
        by_initial_model = pairs["ref_rejected_logps"][:] == pytest.approx(expected, abs=1e-3)
        assert by_initial_model is (iteration == 0 or reference == "fixed")


def logp(model, prompt_ids: list[int], completion_ids: list[int]) -> float:
    ids = torch.tensor([prompt_ids + completion_ids])
    with torch.no_grad():
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    return logps[len(prompt_ids) - 1 :].sum().item()
