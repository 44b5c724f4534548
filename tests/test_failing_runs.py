"""Whole runs on two processes in which one fails or is killed: all of them end, soon, and say why."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from two_processes import LIMIT, TwoProcesses


slow = pytest.mark.slow
SCRIPT = str(ROOT / "tests" / "play_failing.py")


@pytest.fixture
def model(tiny_model, tmp_path) -> str:
    """A copy of the tiny model, so that its path tells this test's processes from all others."""
    return str(shutil.copytree(tiny_model, tmp_path / "model-of-this-test"))


def wait_until_all_end(processes: TwoProcesses, model: str, failed_at: float, record_property) -> None:
    """The launcher, both processes, and the server and its workers, which name the model in their commands."""
    assert processes.wait() != 0, processes.output()
    while any(model in " ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])):
        assert time.time() < failed_at + LIMIT
        time.sleep(0.2)
    seconds = time.time() - failed_at
    record_property("seconds_until_all_ended", round(seconds, 1))
    assert seconds < LIMIT


@pytest.mark.parametrize("phases", ["generate,save,step", pytest.param("score", marks=slow)])
def test_error_of_one_process_ends_all(model, tmp_path, record_property, phases):
    """And where both have caught it, they can begin again."""
    arguments = [SCRIPT, model, str(tmp_path / "out"), phases, "--save_strategy", "epoch"]
    with TwoProcesses(tmp_path, *arguments) as processes:
        assert processes.wait() != 0
        failed_at = float((tmp_path / "out" / "failed-at").read_text())
        wait_until_all_end(processes, model, failed_at, record_property)
    *caught, last = phases.split(",")
    assert f"InjectedError: injected into {last}" in processes.output(1), processes.output()
    for rank in range(2):
        found = re.findall(r"Caught after ([\d.]+) s: injected into (\w+), 0 whole", processes.output(rank))
        assert [phase for _, phase in found] == caught, processes.output()
        assert all(float(seconds) < LIMIT for seconds, _ in found)


@slow
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_process_ends_the_run_and_its_managed_server(model, tmp_path, record_property, rank):
    """The main process holds the server, and works; the other one waits for it."""
    arguments = [SCRIPT, model, str(tmp_path / "out"), "wait", "--use_vllm", "true"]
    with TwoProcesses(tmp_path, *arguments) as processes:
        pid = json.loads(processes.wait_for(Path("out", "pids")).read_text())[rank]
        failed_at = time.time()
        os.kill(pid, signal.SIGKILL)
        wait_until_all_end(processes, model, failed_at, record_property)
