"""That a supervised command never outlives the process that asked for it, with real processes."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from managed import fake_server


PATIENCE = 20.0  # seconds until a test gives up; none waits for it when all is well

# Starts a child, tells both pids, and waits. With "stubborn", neither heeds SIGTERM.
COMMAND = """
import os, signal, subprocess, sys, time
if sys.argv[2] == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(sys.argv[1] + ".tmp", "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
os.rename(sys.argv[1] + ".tmp", sys.argv[1])
time.sleep(600)
"""

# Holds the pipe to a supervisor, as a trainer does, and waits.
HOLDER = """
import subprocess, sys, time
supervisor = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE)
time.sleep(600)
"""

# Supervises as a process in a terminal's foreground does, with another time between SIGTERM and SIGKILL.
SUPERVISOR = """
import signal, sys
from spin_trl.generation.vllm import supervise
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(supervise.supervise(sys.argv[2:], grace_period=float(sys.argv[1])))
"""


def supervisor(*command: str, grace_period: float = 0.2) -> list[str]:
    """The words that supervise `command`."""
    return [sys.executable, "-c", SUPERVISOR, str(grace_period), *command]


def is_gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"  # dead, though nobody has asked how it ended


def wait_for(condition) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


class Processes:
    """Processes of one test; what is left of them at its end is killed."""

    def __init__(self, folder: Path):
        self.pid_file = folder / "pids"
        self.started: list[subprocess.Popen] = []
        self.pids: list[int] = []

    def command(self, kind: str) -> list[str]:
        return [sys.executable, "-c", COMMAND, str(self.pid_file), kind]

    def start(self, argv: list[str]) -> subprocess.Popen:
        process = subprocess.Popen(argv, stdin=subprocess.PIPE)
        self.started.append(process)
        assert wait_for(self.pid_file.exists)
        self.pids = [int(pid) for pid in self.pid_file.read_text().split()]
        assert not any(is_gone(pid) for pid in self.pids)
        return process

    def all_gone(self) -> bool:
        return wait_for(lambda: all(is_gone(pid) for pid in self.pids))

    def kill(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def processes(tmp_path):
    started = Processes(tmp_path)
    yield started
    started.kill()


@pytest.mark.parametrize("kind", ["polite", "stubborn"])
def test_command_and_its_child_end_when_the_pipe_closes(processes, kind):
    process = processes.start(supervisor(*processes.command(kind)))
    process.stdin.close()
    process.wait(timeout=PATIENCE)
    assert processes.all_gone()


def test_command_ends_when_the_holder_of_the_pipe_is_killed(processes):
    holder = processes.start([sys.executable, "-c", HOLDER, *supervisor(*processes.command("polite"))])
    holder.kill()
    assert processes.all_gone()


def test_command_ends_when_the_supervisor_itself_is_killed(processes):
    """What the command started in turn is then its own to end, as vLLM does."""
    process = processes.start(supervisor(*processes.command("polite")))
    process.kill()
    assert wait_for(lambda: is_gone(processes.pids[0]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_command_ends_with_a_supervisor_that_is_told_to_end(processes, number):
    """SIGHUP comes when the terminal closes or the connection to the machine breaks, and ends the trainer as well."""
    process = processes.start(supervisor(*processes.command("polite")))
    process.send_signal(number)
    process.wait(timeout=PATIENCE)
    assert processes.all_gone()


def test_supervisor_that_is_told_to_end_waits_no_longer_than_its_command_needs(processes):
    process = processes.start(supervisor(*processes.command("polite"), grace_period=10_000))
    process.terminate()
    process.wait(timeout=PATIENCE)
    assert processes.all_gone()


def test_interrupt_from_the_keyboard_is_left_to_the_parent(processes):
    process = processes.start(supervisor(*processes.command("polite")))
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.stdin.close()
    process.wait(timeout=PATIENCE)
    assert processes.all_gone()


@pytest.mark.parametrize("status", [0, 3])
def test_exit_status_of_the_command_is_passed_on(status):
    command = [sys.executable, "-m", "spin_trl.generation.vllm.supervise", "sh", "-c", f"exit {status}"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert process.wait(timeout=PATIENCE) == status
    process.stdin.close()


def test_exit_status_of_a_killed_command_is_a_shells():
    command = [sys.executable, "-m", "spin_trl.generation.vllm.supervise", "sh", "-c", "kill -9 $$"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert process.wait(timeout=PATIENCE) == 128 + signal.SIGKILL
    process.stdin.close()


def test_child_that_outlives_the_command_ends_too(processes):
    """The command ends of itself, while its child would go on for ten minutes."""
    process = processes.start(supervisor(*processes.command("polite")))
    os.kill(processes.pids[0], signal.SIGKILL)
    process.wait(timeout=PATIENCE)
    assert processes.all_gone()


def test_managed_server_stops_while_a_forked_worker_still_lives(tmp_path):
    """A data loader's workers inherit the pipe, and live on while an error of the training is on its way up."""
    server = fake_server(tmp_path)
    server.start()
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    worker.start()
    stopping = threading.Thread(target=server.stop, daemon=True)
    try:
        stopping.start()
        stopping.join(timeout=PATIENCE)
        assert not stopping.is_alive()
    finally:
        worker.kill()
        worker.join()
        stopping.join()
