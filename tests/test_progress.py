"""What a run shows of its progress, to a terminal and to a pipe."""

import json
import os
import pty
import re
import subprocess
import sys
import termios
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import TrainerState

from spin_trl.processes.progress import RunProgress, begin_phase, progress_bar


PHASES = ("publish", "evaluate", "generate", "score", "train")
PLACES = [f"Iteration {i} ({i + 1} of 2): {phase}" for i in range(2) for phase in PHASES]
PLACE = r"(Iteration \d \(\d of 2\)|After iteration 1): \w+"
PLACES.append("After iteration 1: evaluate")


@dataclass
class Shown:
    """What a run shows."""

    output: str
    errors: str
    terminal: str  # where that is its standard output and error


@pytest.fixture(scope="module")
def shown(tiny_model, tmp_path_factory) -> Shown:
    """By two short runs at once, one with pipes and one in a terminal."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 200))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    piped = start(tiny_model, tmp_path_factory.mktemp("piped"), **pipes)
    in_terminal = start(tiny_model, tmp_path_factory.mktemp("in-terminal"), stdout=follower, stderr=follower)
    os.close(follower)
    content = b""
    with suppress(OSError):  # how a terminal tells that nobody writes to it any more
        while block := os.read(leader, 1 << 16):
            content += block
    os.close(leader)
    output, errors = piped.communicate(timeout=300)
    assert in_terminal.wait(300) == 0 and piped.returncode == 0, content.decode() + errors
    return Shown(output, errors, content.decode())


def start(model: str, folder: Path, **streams) -> subprocess.Popen:
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent)])
    config = {"output_dir": str(folder / "run"), "save_strategy": "no", "disable_tqdm": False}
    job = json.dumps({"model": model, "config": config})
    command = [sys.executable, str(tests / "play_short.py"), job]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}, **streams)


def test_pipe_gets_one_line_a_phase_with_numbers_and_none_a_step(shown):
    lines = [line for line in shown.errors.splitlines() if " done in " in line]
    assert [line.partition(" done in ")[0] for line in lines] == PLACES
    numbers = r"done in \d\d:\d\d, 16/16 completions, [\d.]+ completions/s, \d+ tokens/s, 0/4 steps, \? left"
    assert re.search(f"Iteration 0.*: generate {numbers}", shown.errors)
    numbers = r"done in \d\d:\d\d, 2/4 steps, [\d.]+ steps/s, loss 0\.\d+, accuracy \d+%, \d\d:\d\d left"
    assert re.search(f"Iteration 0.*: train {numbers}", shown.errors)
    assert "steps" not in "".join(line for line in shown.errors.splitlines() if line not in lines)
    assert "'loss'" not in shown.output


def test_terminal_gets_a_bar_with_iteration_phase_and_time_left_and_one_for_the_phase(shown):
    bars = [text.strip() for text in re.split(r"[\r\n]", shown.terminal) if "%|" in text]
    assert list(dict.fromkeys(place[0] for bar in bars if (place := re.match(PLACE, bar)))) == PLACES
    assert any(re.search(r"train:  75%.* 3/4 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+ steps/s\]", bar) for bar in bars)
    assert any(re.search(r"generations: .*/16 .* completions/s", bar) for bar in bars)
    assert " done in " not in shown.terminal


def test_pipe_gets_a_line_now_and_then_of_a_phase_that_takes_long(capfd):
    """With loss, accuracy and time left. Here the time between two lines is none."""
    progress = RunProgress(num_iterations=2, seconds_between_lines=0)
    state = TrainerState(max_steps=4)
    progress.on_train_begin(None, state, None)
    begin_phase("generate", 0)
    with progress_bar(total=2, mininterval=0) as bar:
        bar.update()
    begin_phase("train", 0)
    progress.on_log(None, state, None, logs={"loss": 0.5, "rewards/accuracies": 0.75})
    state.global_step = 1
    progress.on_step_end(None, state, None)
    progress.on_train_end(None, state, None)
    lines = [line for line in capfd.readouterr().err.splitlines() if " done in " not in line]
    assert re.fullmatch(r"Iteration 0 \(1 of 2\): generate: 1/2 batches, .*\d\d:\d\d left", lines[-2])
    assert re.fullmatch(r"Iteration 0 .*: train: 1/4 steps, .*loss 0\.5, accuracy 75%, \d\d:\d\d left", lines[-1])


def test_processes_but_the_first_show_nothing(capfd):
    progress = RunProgress(num_iterations=2)
    state = TrainerState(max_steps=4, is_world_process_zero=False)
    progress.on_train_begin(None, state, None)
    begin_phase("generate", 0)
    with progress_bar(total=2, disable=True) as bar:
        bar.update()
    state.global_step = 1
    progress.on_step_end(None, state, None)
    progress.on_log(None, state, None, logs={"loss": 0.5})
    progress.on_train_end(None, state, None)
    assert capfd.readouterr() == ("", "")
