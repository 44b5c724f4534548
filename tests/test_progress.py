"""What a run shows of its progress, to a terminal and to a pipe, and the estimate of the time left."""

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

from spin_trl.processes.progress import RunProgress, TimeLeft, begin_phase


PHASES = ("publish", "evaluate", "generate", "score")


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
    expected = [f"Iteration {i} ({i + 1} of 2): {phase}" for i in range(2) for phase in (*PHASES, "train")]
    assert [line.partition(" done in ")[0] for line in lines] == [*expected, "After iteration 1: evaluate"]
    assert re.search(r"generate done in [\d.]+ s, 16/16 completions, \d+ tokens/s", done.stderr)
    assert re.search(r"train done in [\d.]+ s, 2 steps \(at 2/4\), loss 0\.\d+, .*left", done.stderr)
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


def test_terminal_gets_one_bar_with_iteration_phase_and_time_left(command):
    shown = read_terminal(command)
    bars = [text.strip() for text in re.split(r"[\r\n]", shown) if "%|" in text]
    bars = bars[next(i for i, bar in enumerate(bars) if "publish" in bar) :]  # before are those of data and model
    places = list(dict.fromkeys(re.sub(r"[\d ]+%.*", "", bar).strip() for bar in bars))
    expected = [f"Iteration {i} ({i + 1} of 2): {phase}" for i in range(2) for phase in (*PHASES, "train")]
    assert places == [*expected, "After iteration 1: evaluate"]
    assert all("steps" in bar for bar in bars)
    assert any("generate" in bar and "completions" in bar for bar in bars)
    assert "? left" in shown and re.search(r"[\d.:]+( s)? left", shown)
    assert " done in " not in shown


def test_time_left_adds_the_phases_and_steps_to_come():
    left = TimeLeft(2, ("generate", "score"))
    left.seconds = {"generate": 10.0, "score": 4.0}
    assert left.estimate(0, "train", 1.0, 0.0, 30) is None  # no step has been seen
    left.seconds_per_step = 2.0
    # 5 steps left, and generating and scoring of iteration 1.
    assert left.estimate(0, "train", 1.0, 0.0, 5) == 10.0 + 14.0
    # Half of iteration 1's answers took 8 seconds: 8 more, 4 of scoring, 3 steps.
    assert left.estimate(1, "generate", 8.0, 0.5, 3) == 8.0 + 4.0 + 6.0


def test_time_left_is_not_known_before_every_phase_has_been_seen():
    left = TimeLeft(1, ("generate", "score"))
    left.seconds_per_step = 1.0
    assert left.estimate(0, "generate", 5.0, 0.5, 3) is None
    left.seconds["score"] = 2.0
    assert left.estimate(0, "generate", 5.0, 0.5, 3) == 5.0 + 2.0 + 3.0


def test_processes_but_the_first_show_nothing(capfd):
    progress = RunProgress(num_iterations=2, evaluates=True)
    state = TrainerState(max_steps=4, is_world_process_zero=False)
    progress.on_train_begin(None, state, None)
    begin_phase("generate", 0)
    state.global_step = 1
    progress.on_step_end(None, state, None)
    progress.on_log(None, state, None, logs={"loss": 0.5})
    progress.on_train_end(None, state, None)
    assert capfd.readouterr() == ("", "")
