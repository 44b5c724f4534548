"""Schedules, moments and references in a plain run, in two processes, and sharded by DeepSpeed and FSDP2."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from conftest import DATA, RECIPES, ROOT
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from play_distributed import play, settings
from transformers import AutoModelForCausalLM

from spin_trl import SPINConfig, load_pairs


ACCELERATE = RECIPES / "accelerate"
TRAIN_FILE = DATA / "accent_train.jsonl"
slow = pytest.mark.slow

# (accelerate configuration or None for this process, what is trained, opponent_reference, class that wraps the policy)
RUNS = [
    pytest.param((None, "full", "previous", "LlamaForCausalLM"), id="plain"),
    pytest.param(("ddp", "full", "previous", "DistributedDataParallel"), id="ddp"),
    pytest.param(("zero3", "full", "fixed", "DeepSpeedEngine"), id="zero3-fixed"),
    pytest.param(("fsdp2", "lora", "previous", "FSDPPeftModel"), id="fsdp2-lora"),
    pytest.param(("single", "full", "previous", "LlamaForCausalLM"), id="single", marks=slow),
    pytest.param(("single", "lora", "previous", "PeftModel"), id="single-lora", marks=slow),
    pytest.param(("ddp", "lora", "previous", "DistributedDataParallel"), id="ddp-lora", marks=slow),
    pytest.param(("zero2", "full", "fixed", "DeepSpeedEngine"), id="zero2-fixed", marks=slow),
    pytest.param(("zero2", "lora", "previous", "DeepSpeedEngine"), id="zero2-lora", marks=slow),
    pytest.param(("zero3", "full", "previous", "DeepSpeedEngine"), id="zero3", marks=slow),
    pytest.param(("zero3", "lora", "previous", "DeepSpeedEngine"), id="zero3-lora", marks=slow),
    pytest.param(("fsdp2", "full", "previous", "FSDPLlamaForCausalLM"), id="fsdp2", marks=slow),
    pytest.param(("fsdp2", "full", "fixed", "FSDPLlamaForCausalLM"), id="fsdp2-fixed", marks=slow),
]


@dataclass(frozen=True)
class Run:
    """What every process of a run saw, and what it left."""

    seen: list[dict]
    output_dir: Path
    adapter: str
    reference: str
    wrapper: str


def launch(name: str, folder, arguments: list[str], **variables: str) -> subprocess.CompletedProcess:
    """Run `play_distributed.py` under a recipe's configuration, on two CPU processes, or on one where it says one."""
    config = yaml.safe_load((ACCELERATE / f"{name}.yaml").read_text())
    config |= {"use_cpu": True, "num_processes": min(2, config["num_processes"]), "mixed_precision": "no"}
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


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_model):
    """Plays, once for each kind of run, in this process."""

    @cache
    def play_alone(adapter: str, reference: str) -> Run:
        output_dir = tmp_path_factory.mktemp("alone")
        config = SPINConfig(**settings(str(output_dir), opponent_reference=reference))
        seen = play(tiny_model, str(TRAIN_FILE), config, adapter)
        return Run([seen], output_dir, adapter, reference, seen["wrapper"])

    return play_alone


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory, tiny_model, alone) -> Run:
    name, adapter, reference, wrapper = request.param
    if name is None:
        return replace(alone(adapter, reference), wrapper=wrapper)
    folder = tmp_path_factory.mktemp("run")
    output_dir = folder / "out"
    arguments = [tiny_model, str(TRAIN_FILE), str(output_dir), "--opponent_reference", reference]
    if name == "fsdp2":
        arguments += ["--use_cpu", "false"]  # see `let_fsdp_run_on_cpu`
    done = launch(name, folder, arguments, ADAPTER=adapter)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    num_processes = 1 if name == "single" else 2
    seen = [json.loads((output_dir / f"seen-{rank}.json").read_text()) for rank in range(num_processes)]
    assert [process["num_processes"] for process in seen] == [num_processes] * num_processes
    return Run(seen, output_dir, adapter, reference, wrapper)


def expected_rates(peak: float, num_steps: int) -> list[float]:
    """Linear warm-up over a quarter of the steps, then linear decay to 0: k/w up to step w, (n-k)/(n-w) from there."""
    warmup = num_steps / 4
    return [peak * min(k / warmup, (num_steps - k) / (num_steps - warmup)) for k in range(num_steps)]


def test_every_step_has_the_learning_rate_of_its_iterations_own_curve(run):
    """30 pairs in batches of 8 are 4 steps, then with history 60 are 8."""
    expected = expected_rates(1e-3, 4) + expected_rates(2e-4, 8)
    for seen in run.seen:
        assert seen["learning_rate"] == pytest.approx(expected)
        for number, step in enumerate(seen["begins"]):
            assert step["rates"] == pytest.approx([expected[number]] * len(step["rates"])), number


def test_moments_are_fresh_at_the_first_step_of_every_iteration(run):
    for seen in run.seen:
        assert seen["wrapper"] == run.wrapper
        assert [seen["begins"][step]["moment"] for step in (0, 4)] == [0, 0]
        assert min(step["moment"] for step in seen["ends"][1:4] + seen["ends"][5:]) > 0
        assert [step["adam_step"] for step in seen["ends"]] == [1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7, 8]


def test_policy_equals_the_reference_where_the_reference_is_the_opponent(run):
    """log 2 at the first step of both iterations, or, if the reference stays the initial model, of the first only."""
    for seen in run.seen:
        assert seen["loss"][0] == pytest.approx(math.log(2), abs=1e-6)
        moves_on = run.reference == "previous"
        assert (abs(seen["loss"][4] - math.log(2)) < 1e-6) is moves_on


def test_beta_is_the_last_iterations_at_the_end(run):
    assert {seen["beta"] for seen in run.seen} == {0.5}


def test_every_prompt_is_paired_once_and_scored_by_the_reference(run, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for iteration in (0, 1):
        pairs = pairs_of(run, iteration)
        assert sorted(pairs["row"][:30]) == list(range(30))
        expected = [logp(model, row["prompt_ids"], row["rejected_ids"]) for row in pairs]
        by_initial_model = pairs["ref_rejected_logps"][:] == pytest.approx(expected, abs=1e-3)
        assert by_initial_model is (iteration == 0 or run.reference == "fixed")


# However the processes divide the work, the result is that of one alone.


def test_pairs_are_those_of_one_process(run, alone):
    for iteration in (0, 1):
        pairs, expected = pairs_of(run, iteration), pairs_of(alone(run.adapter, run.reference), iteration)
        for name in ("iteration", "row", "sample", "prompt_ids", "chosen_ids", "rejected_ids"):
            assert pairs[name][:] == expected[name][:], name
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            assert pairs[name][:] == pytest.approx(expected[name][:], abs=1e-3), name


def test_losses_are_those_of_one_process(run, alone):
    """The same pairs in every step, in all twelve; the last step of an epoch would hold six instead of eight."""
    expected = alone(run.adapter, run.reference).seen[0]["loss"]
    for seen in run.seen:
        assert seen["loss"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["opponent", "final"])
def test_saved_policy_is_that_of_one_process(run, alone, name, tiny_model):
    saved = load(run.output_dir / name, run.adapter, tiny_model)
    expected = load(alone(run.adapter, run.reference).output_dir / name, run.adapter, tiny_model)
    assert saved.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(saved[key], expected[key], atol=1e-4, rtol=0, msg=key)
    initial = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    assert any((saved[key] - initial.get(key, 0)).abs().max() > 1e-3 for key in saved)


def load(folder: Path, adapter: str, tiny_model: str) -> dict[str, torch.Tensor]:
    """What was trained, as transformers or PEFT reads it."""
    if adapter == "full":
        return AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return get_peft_model_state_dict(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder)
    )


def pairs_of(run: Run, iteration: int) -> Dataset:
    return load_pairs(run.output_dir, iteration)


def logp(model, prompt_ids: list[int], completion_ids: list[int]) -> float:
    ids = torch.tensor([prompt_ids + completion_ids])
    with torch.no_grad():
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    return logps[len(prompt_ids) - 1 :].sum().item()
