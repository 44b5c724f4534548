"""What a run shows of its progress, to a terminal and to a pipe."""

import json
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from transformers import TrainerState

from spin_trl.processes.progress import RunProgress, begin_phase, progress_bar


PHASES = ("publish", "evaluate", "generate", "score", "train")
PLACES = [f"Iteration {i} ({i + 1} of 2): {phase}" for i in range(2) for phase in PHASES]
PLACE = r"(Iteration \d \(\d of 2\)|After iteration 1): \w+"
PLACES.append("After iteration 1: evaluate")


@pytest.fixture
def command(tiny_model, tmp_path) -> list[str]:
    config = {"output_dir": str(tmp_path / "run"), "save_strategy": "no"}
    job = json.dumps({"model": tiny_model, "config": config})
    return [sys.executable, str(Path(__file__).with_name("play_short.py")), job]


def environment() -> dict[str, str]:
    tests = Path(__file__).parent
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]), "COLUMNS": "200"}


def test_pipe_gets_one_line_a_phase_with_numbers_and_none_a_step(command):
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if " done in " in line]
    assert [line.partition(" done in ")[0] for line in lines] == PLACES
    numbers = r"done in \d\d:\d\d, 16/16 completions, [\d.]+ completions/s, \d+ tokens/s, 0/4 steps, \? left"
    assert re.search(f"Iteration 0.*: generate {numbers}", done.stderr)
    numbers = r"done in \d\d:\d\d, 2/4 steps, [\d.]+ steps/s, loss 0\.\d+, \d\d:\d\d left"
    assert re.search(f"Iteration 0.*: train {numbers}", done.stderr)
    assert "steps" not in "".join(line for line in done.stderr.splitlines() if line not in lines)
    assert "'loss'" not in done.stdout


def read_terminal(command: list[str]) -> str:
    """What a command writes to a terminal that is its standard output and error."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 200))
    process = subprocess.Popen(command, env=environment(), stdout=follower, stderr=follower)
    os.close(follower)
    content = b""
    try:
        while block := os.read(leader, 1 << 16):
            content += block
    except OSError:  # how a terminal tells that nobody writes to it any more
        pass
    finally:
        os.close(leader)
    assert process.wait(300) == 0, content.decode()
    return content.decode()


def test_terminal_gets_a_bar_with_iteration_phase_and_time_left_and_one_for_the_phase(command):
    shown = read_terminal(command)
    bars = [text.strip() for text in re.split(r"[\r\n]", shown) if "%|" in text]
    assert list(dict.fromkeys(place[0] for bar in bars if (place := re.match(PLACE, bar)))) == PLACES
    assert any(re.search(r"train:  75%.* 3/4 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+ steps/s\]", bar) for bar in bars)
    assert any(re.search(r"generations: .*/16 .* completions/s", bar) for bar in bars)
    assert " done in " not in shown


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
