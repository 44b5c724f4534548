"""That a supervised command never outlives the process that asked for it, with real processes."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from managed import PATIENCE, wait_for


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

# Supervises as a process in a terminal's foreground does.
SUPERVISOR = """
import signal, sys
from spin_trl.generation.vllm import supervise
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(supervise.supervise(int(sys.argv[1]), sys.argv[3:], grace_period=float(sys.argv[2])))
"""


def is_gone(pid: int) -> bool:
    """Also if nobody has asked how it ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Processes:
    """A supervisor, its command and the command's child; what is left of them at the end of a test is killed."""

    def __init__(self, folder: Path):
        self.pid_file = folder / "pids"
        self.process: subprocess.Popen | None = None
        self.pids: list[int] = []

    def start(self, kind: str = "polite") -> subprocess.Popen:
        """A polite command is given so much time to end that it must not be waited for; a stubborn one none."""
        supervisor = [sys.executable, "-c", SUPERVISOR, str(os.getpid()), "0.2" if kind == "stubborn" else "10_000"]
        command = [sys.executable, "-c", COMMAND, str(self.pid_file), kind]
        self.process = subprocess.Popen([*supervisor, *command])
        assert wait_for(self.pid_file.exists)
        self.pids = [int(pid) for pid in self.pid_file.read_text().split()]
        assert not any(is_gone(pid) for pid in self.pids)
        return self.process

    def all_end(self) -> bool:
        self.process.wait(timeout=PATIENCE)
        return wait_for(lambda: all(is_gone(pid) for pid in self.pids))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def processes(tmp_path):
    started = Processes(tmp_path)
    yield started
    started.kill()


@pytest.mark.parametrize("kind", ["polite", "stubborn"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_command_and_its_child_end_when_the_supervisor_is_told_to_end(processes, number, kind):
    """SIGHUP comes when the terminal closes or the connection to the machine breaks, and ends the trainer as well."""
    processes.start(kind).send_signal(number)
    assert processes.all_end()


def test_command_ends_when_the_supervisor_itself_is_killed(processes):
    """What the command started in turn is then its own to end, as vLLM does."""
    processes.start().kill()
    assert wait_for(lambda: is_gone(processes.pids[0]))


def test_child_that_outlives_the_command_ends_too(processes):
    """The command ends of itself, while its child would go on for ten minutes."""
    processes.start()
    os.kill(processes.pids[0], signal.SIGKILL)
    assert processes.all_end()


def test_interrupt_from_the_keyboard_is_left_to_the_parent(processes):
    process = processes.start()
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)


@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", 128 + signal.SIGKILL)])
def test_exit_status_of_the_command_is_passed_on_as_a_shell_does(script, status):
    supervisor = [sys.executable, "-m", "spin_trl.generation.vllm.supervise", str(os.getpid())]
    assert subprocess.run([*supervisor, "sh", "-c", script], timeout=PATIENCE).returncode == status
