"""Whole runs on two processes in which one fails or is killed: all of them end, soon, and say why."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from test_managed_server import running_processes
from two_processes import PATIENCE, TwoProcesses


slow = pytest.mark.slow
SCRIPT = str(ROOT / "tests" / "play_failing.py")
LIMIT = 60.0  # seconds from a failure until every process has ended


def wait_until_gone(text: str, seconds: float) -> list[str]:
    """Command lines with `text`, a path of this test's, of processes that still run then."""
    deadline = time.monotonic() + seconds
    while (left := [command for command, _ in running_processes() if text in command]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


@pytest.fixture
def model(tiny_model, tmp_path) -> str:
    """A copy of the tiny model, so that its path tells this test's processes from all others."""
    return str(shutil.copytree(tiny_model, tmp_path / "model-of-this-test"))


def check_that_all_end(processes: TwoProcesses, output_dir: Path, record_property) -> None:
    assert all(status != 0 for status in processes.wait())
    ended_at = time.time()
    assert (output_dir / "failed-at").exists(), processes.output()
    seconds = ended_at - float((output_dir / "failed-at").read_text())
    record_property("seconds_until_all_ended", round(seconds, 1))
    assert seconds < LIMIT
    for rank in range(2):
        assert "InjectedError: injected into process 1" in processes.output(rank), processes.output()
    assert wait_until_gone(str(output_dir), seconds=1) == []


@pytest.mark.parametrize(
    "phase",
    ["step"] + [pytest.param(name, marks=slow) for name in ("publish", "evaluate", "generate", "score", "save")],
)
def test_error_of_one_process_ends_all_in_whatever_phase(model, tmp_path, record_property, phase):
    """There is no launcher, so each process ends by itself."""
    processes = TwoProcesses(tmp_path, SCRIPT, model, str(tmp_path / "out"), phase)
    check_that_all_end(processes, tmp_path / "out", record_property)


@slow
def test_error_of_one_process_ends_the_managed_server_too(model, tmp_path, record_property):
    arguments = ["--vllm_mode", "managed", "--use_vllm", "true"]
    processes = TwoProcesses(tmp_path, SCRIPT, model, str(tmp_path / "out"), "generate", *arguments)
    check_that_all_end(processes, tmp_path / "out", record_property)
    assert wait_until_gone(model, seconds=1) == []


def test_run_can_be_begun_again_after_an_error_that_was_caught(model, tmp_path):
    processes = TwoProcesses(tmp_path, SCRIPT, model, str(tmp_path / "out"), "generate--again")
    assert processes.wait() == [0, 0], processes.output()
    assert "Process 1 has failed, so process 0 stops too: InjectedError" in processes.output(0)
    assert [(tmp_path / "out" / f"trained-{rank}").read_text() for rank in range(2)] == ["5", "5"]  # 40 pairs by 8


@slow
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_process_ends_the_run_and_its_managed_server_under_a_launcher(model, tmp_path, record_property, rank):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += [SCRIPT, model, str(tmp_path / "out"), "generate--wait", "--vllm_mode", "managed", "--use_vllm", "true"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    with (tmp_path / "output").open("w") as output:
        launcher = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + PATIENCE
        while not all((tmp_path / "out" / f"sampling-{number}").exists() for number in range(2)):
            assert launcher.poll() is None and time.monotonic() < deadline, (tmp_path / "output").read_text()[-3000:]
            time.sleep(0.1)
        pid = int((tmp_path / "out" / f"sampling-{rank}").read_text())
        killed_at = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        assert launcher.wait(timeout=PATIENCE) != 0
        assert wait_until_gone(model, seconds=LIMIT) == []
        seconds = time.monotonic() - killed_at
        record_property("seconds_until_all_ended", round(seconds, 1))
        assert seconds < LIMIT
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)  # its processes too
