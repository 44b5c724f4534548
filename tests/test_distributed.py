"""Schedules, moments, references and memory: in a plain run, in two processes, and sharded by DeepSpeed and FSDP2."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from conftest import DATA, RECIPES, ROOT, logp
from peft import PeftModel, get_peft_model_state_dict
from play_distributed import play, settings
from transformers import AutoModelForCausalLM

from spin_trl import SPINConfig, load_pairs


ACCELERATE = RECIPES / "accelerate"
TRAIN_FILE = DATA / "accent_train.jsonl"
slow = pytest.mark.slow

BEST = ["--metric_for_best_model", "nll", "--load_best_model_at_end", "true"]
# Three iterations of one size.
ALIKE = {"num_iterations": 3, "num_history_iterations": 0, "learning_rate": 1e-3, "beta": 0.1}
# Earlier opponents, where weights are not sharded, and a reference that is two policies.
MIXED = {"reference_mixture_alpha": 0.5}
SEVERAL = {"num_opponents": 2, **MIXED}
STOPPABLE = ["--resume", "auto", "--save_strategy", "steps", "--save_steps", "100"]


def words(fields: dict) -> list[str]:
    return [word for name, value in fields.items() for word in (f"--{name}", str(value))]


# What else a launch plays, each in a folder and with further fields. The two that are stopped: until SIGTERM to one
# process stops both in step 7 of twelve or, if the signal comes late, in the one after; and again from there.
OTHERS = [("best", BEST), ("alike", words(ALIKE)), ("mixed", words(SEVERAL))]
OTHERS += [("mixed-lora", words({"adapter": "lora", **SEVERAL}))]
STOPPED = [("resumed", [*STOPPABLE, "--sigterm_to", "1", "--sigterm_at", "6"]), ("resumed", STOPPABLE)]
# The accelerate configuration, what is trained with which reference_mixture_alpha, and others.
LAUNCHES = {
    "ddp": ("ddp", [("full", "0")], STOPPED),
    "zero3": ("zero3", [("full", "1")], []),
    "fsdp2": ("fsdp2", [("lora", "0")], []),
    "slow-ddp": ("ddp", [("lora", "0")], OTHERS),
    "slow-zero2": ("zero2", [("full", "1"), ("lora", "0")], STOPPED),
    "slow-zero3": (
        "zero3",
        [("full", "0"), ("lora", "0")],
        [*STOPPED, ("mixed", words(MIXED))],
    ),
    "slow-fsdp2": ("fsdp2", [("full", "0"), ("full", "1")], STOPPED),
    "slow-single": ("single", [("full", "0"), ("lora", "0")], []),
}
WRAPPERS = {
    "ddp": {"full": "DistributedDataParallel", "lora": "DistributedDataParallel"},
    "zero2": {"full": "DeepSpeedEngine", "lora": "DeepSpeedEngine"},
    "zero3": {"full": "DeepSpeedEngine", "lora": "DeepSpeedEngine"},
    "fsdp2": {"full": "FSDPLlamaForCausalLM", "lora": "FSDPPeftModel"},
    "single": {"full": "LlamaForCausalLM", "lora": "PeftModel"},
}
SHARDINGS = {"zero2": ["deepspeed", 2], "zero3": ["deepspeed", 3], "fsdp2": ["fsdp", 2]}


def marked(launch_id: str, *more: str):
    """A parameter, slow where the launch is."""
    marks = slow if launch_id.startswith("slow") else ()
    return pytest.param((launch_id, *more) if more else launch_id, id="-".join([launch_id, *more]), marks=marks)


RUNS = [pytest.param(("plain", "full", "0"), id="plain")]
RUNS += [marked(launch_id, *played) for launch_id, (_, plays, _) in LAUNCHES.items() for played in plays]


@dataclass(frozen=True)
class Run:
    """What every process of a run saw, and what it left. `launcher` is the accelerate configuration, if any."""

    seen: list[dict]
    output_dir: Path
    adapter: str
    reference: str
    launcher: str


def launch(name: str, folder: Path, arguments: list[str]) -> subprocess.CompletedProcess:
    """Run `play_distributed.py` under a recipe's configuration, on two CPU processes, or on one where it says one."""
    config = yaml.safe_load((ACCELERATE / f"{name}.yaml").read_text())
    config |= {"use_cpu": True, "num_processes": min(2, config["num_processes"]), "mixed_precision": "no"}
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate.yaml")]
    command += ["--main_process_port", "0", str(ROOT / "tests" / "play_distributed.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    launcher = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
    try:
        stdout, stderr = launcher.communicate(timeout=540)  # DeepSpeed compiles at first use, which may take minutes
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)  # its processes too
    return subprocess.CompletedProcess(command, launcher.returncode, stdout, stderr)


def seen_in(output_dir: Path, count: int = 2) -> list[dict]:
    return [json.loads((output_dir / f"seen-{rank}.json").read_text()) for rank in range(count)]


@pytest.fixture(scope="module")
def launched(tmp_path_factory, tiny_model):
    """Plays all of a launch, once. Returns the folder in which each play has its own, and the output."""

    @cache
    def play_all(launch_id: str) -> tuple[Path, str]:
        name, plays, others = LAUNCHES[launch_id]
        folder = tmp_path_factory.mktemp(launch_id)
        played = [(f"{adapter}-{reference}", ["--adapter", adapter], reference) for adapter, reference in plays]
        played += [(output_dir, fields, plays[0][1]) for output_dir, fields in others]
        arguments = [tiny_model, str(TRAIN_FILE)]
        for number, (output_dir, fields, reference) in enumerate(played):
            arguments += ["--"] * (number > 0) + [str(folder / output_dir), "--reference_mixture_alpha", reference]
            arguments += [*fields, *["--use_cpu", "false"] * (name == "fsdp2")]  # see `let_fsdp_run_on_cpu`
        done = launch(name, folder, arguments)
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        return folder, done.stdout

    return play_all


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_model):
    """Plays, once for each kind of run, in this process."""

    @cache
    def play_alone(adapter: str, reference: str) -> Run:
        output_dir = tmp_path_factory.mktemp("alone")
        config = SPINConfig(**settings(str(output_dir), reference_mixture_alpha=float(reference)))
        return Run([play(tiny_model, str(TRAIN_FILE), config, adapter)], output_dir, adapter, reference, "single")

    return play_alone


@pytest.fixture(scope="module", params=RUNS)
def run(request, alone, launched) -> Run:
    launch_id, adapter, reference = request.param
    if launch_id == "plain":
        return alone(adapter, reference)
    name, output_dir = LAUNCHES[launch_id][0], launched(launch_id)[0] / f"{adapter}-{reference}"
    num_processes = 1 if name == "single" else 2
    seen = seen_in(output_dir, num_processes)
    assert [process["num_processes"] for process in seen] == [num_processes] * num_processes
    return Run(seen, output_dir, adapter, reference, name)


def expected_rates(peak: float, num_steps: int) -> list[float]:
    """Linear warm-up over a quarter of the steps, then linear decay to 0: k/w up to step w, (n-k)/(n-w) from there."""
    warmup = num_steps / 4
    return [peak * min(k / warmup, (num_steps - k) / (num_steps - warmup)) for k in range(num_steps)]


def test_run_is_sharded_as_the_launcher_says_which_is_known_beforehand(run):
    for seen in run.seen:
        assert seen["wrapper"] == WRAPPERS[run.launcher][run.adapter]
        assert seen["sharding"] == SHARDINGS.get(run.launcher, [None, 0])


def test_every_step_has_the_learning_rate_of_its_iterations_own_curve(run):
    """30 pairs in batches of 8 are 4 steps, then with history 60 are 8."""
    expected = expected_rates(1e-3, 4) + expected_rates(2e-4, 8)
    for seen in run.seen:
        assert seen["learning_rate"] == pytest.approx(expected)
        for number, step in enumerate(seen["begins"]):
            assert step["rates"] == pytest.approx([expected[number]] * len(step["rates"])), number
        assert seen["beta"] == 0.5  # the last iteration's


def test_moments_are_fresh_at_the_first_step_of_every_iteration(run):
    for seen in run.seen:
        assert [seen["begins"][step]["moment"] for step in (0, 4)] == [0, 0]
        assert min(step["moment"] for step in seen["ends"][1:4] + seen["ends"][5:]) > 0
        assert [step["adam_step"] for step in seen["ends"]] == [1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7, 8]


def test_policy_equals_the_reference_where_the_reference_is_the_opponent(run):
    """log 2 at the first step of both iterations, or, if the reference stays the initial model, of the first only."""
    for seen in run.seen:
        assert seen["loss"][0] == pytest.approx(math.log(2), abs=1e-6)
        moves_on = run.reference == "0"
        assert (abs(seen["loss"][4] - math.log(2)) < 1e-6) is moves_on


def test_every_prompt_is_paired_once_and_scored_by_the_reference(run, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for iteration in (0, 1):
        pairs = load_pairs(run.output_dir, iteration)
        assert sorted(pairs["row"][:30]) == list(range(30))
        expected = [logp(model, row["prompt_ids"], row["rejected_ids"]) for row in pairs]
        by_initial_model = pairs["ref_rejected_logps"][:] == pytest.approx(expected, abs=1e-3)
        assert by_initial_model is (iteration == 0 or run.reference == "1")


# However the processes divide the work, the result is that of one alone.


def test_pairs_and_losses_are_those_of_one_process(run, alone):
    """The same pairs in every step, in all twelve; the last step of an epoch would hold six instead of eight."""
    expected = alone(run.adapter, run.reference)
    assert_same_pairs(run.output_dir, expected.output_dir)
    for seen in run.seen:
        assert seen["loss"] == pytest.approx(expected.seen[0]["loss"], abs=1e-4)


def assert_same_pairs(output_dir: Path, expected_dir: Path) -> None:
    for iteration in (0, 1):
        pairs, expected = load_pairs(output_dir, iteration), load_pairs(expected_dir, iteration)
        assert pairs.column_names == expected.column_names
        for name in pairs.column_names:
            values = expected[name][:]
            assert pairs[name][:] == (pytest.approx(values, abs=1e-3) if name.endswith("_logps") else values), name


@slow
@pytest.mark.parametrize(
    ("launch_id", "folder", "adapter", "fields"),
    [
        ("slow-ddp", "mixed", "full", SEVERAL),
        ("slow-ddp", "mixed-lora", "lora", SEVERAL),
        ("slow-zero3", "mixed", "full", MIXED),
    ],
)
def test_pairs_of_several_opponents_or_references_are_those_of_one_process(
    launched, tiny_model, tmp_path, launch_id, folder, adapter, fields
):
    play(tiny_model, str(TRAIN_FILE), SPINConfig(**settings(str(tmp_path), **fields)), adapter)
    assert_same_pairs(launched(launch_id)[0] / folder, tmp_path)


# Nothing that an iteration makes outlives it.


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_no_iteration_leaves_anything_behind(adapter, tiny_model, tmp_path):
    seen = play(tiny_model, str(TRAIN_FILE), SPINConfig(**settings(str(tmp_path), **ALIKE)), adapter)
    assert_nothing_grows(seen["live"])


@slow
def test_no_iteration_leaves_anything_behind_in_two_processes(launched):
    for seen in seen_in(launched("slow-ddp")[0] / "alike"):
        assert_nothing_grows(seen["live"])


def assert_nothing_grows(live: list[dict[str, int]]) -> None:
    """Counted at the first step of each iteration. The first has no optimizer state yet to have been emptied."""
    assert len(live) == 3
    assert live[2] == live[1]
    assert min(live[1][kind] for kind in ("tensors", "numbers", "datasets", "loaders", "modules")) > 0


@pytest.mark.parametrize("name", ["opponent", "final"])
def test_saved_policy_is_that_of_one_process(run, alone, name, tiny_model):
    saved = load(run.output_dir / name, run.adapter, tiny_model)
    expected = load(alone(run.adapter, run.reference).output_dir / name, run.adapter, tiny_model)
    assert saved.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(saved[key], expected[key], atol=1e-4, rtol=0, msg=key)
    initial = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    assert any((saved[key] - initial.get(key, 0)).abs().max() > 1e-3 for key in saved)


# Stopped, taken back


@pytest.mark.parametrize("launch_id", [marked(name) for name, launch in LAUNCHES.items() if STOPPED[0] in launch[2]])
def test_run_goes_on_where_sigterm_to_one_process_stopped_both(launch_id, launched):
    (folder, output), (_, [(_, reference), *_], _) = launched(launch_id), LAUNCHES[launch_id]
    assert output.count("Stopped by a signal after step") == 1 and output.count("Would end with status 143") == 2
    step = re.search(r"goes on from checkpoint-(\d+): iteration 1", output)[1]
    assert step in ("7", "8")
    losses, expected = ([seen["loss"] for seen in seen_in(folder / name)] for name in ("resumed", f"full-{reference}"))
    assert len(losses[0]) == 12
    torch.testing.assert_close(losses, expected, atol=1e-6, rtol=0)


@slow
def test_every_process_logs_the_same_numbers_and_has_the_best_policy(launched, tiny_model):
    """The least negative log-likelihood is the start's: a policy that the last step has left behind."""
    folder, output = launched("slow-ddp")
    first, second = seen_in(folder / "best")
    assert first["logged"] == second["logged"]
    assert json.loads((folder / "best" / "self_play.json").read_text())["best_iteration"]["after"] == "start"
    start = {n: p.double().sum().item() for n, p in AutoModelForCausalLM.from_pretrained(tiny_model).named_parameters()}
    for seen in (first, second):
        assert seen["policy"] == pytest.approx(start, abs=1e-9)
    last = json.loads((folder / "best" / "iteration-2" / "metrics.json").read_text())["evaluation"]
    assert 0 <= last["rewards/accuracies"] <= 1
    assert output.count("The start is the best by `nll`") == 1


def load(folder: Path, adapter: str, tiny_model: str) -> dict[str, torch.Tensor]:
    """What was trained, as transformers or PEFT reads it."""
    if adapter == "full":
        return AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return get_peft_model_state_dict(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder)
    )
