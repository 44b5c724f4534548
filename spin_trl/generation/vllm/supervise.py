"""Run a command while a process lives: `python -m spin_trl.generation.vllm.supervise PID COMMAND...`.

When this process is told to end (SIGTERM, SIGHUP), or its parent PID is gone in whatever way, the command and all its
children are ended: SIGTERM, and SIGKILL to what is left after a while.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress


GRACE_PERIOD = 15.0  # seconds between SIGTERM and SIGKILL
_POLL_INTERVAL = 0.1  # seconds
_SET_SIGNAL_AT_PARENTS_DEATH = 1  # PR_SET_PDEATHSIG of prctl(2)


def supervise(parent: int, argv: list[str], grace_period: float = GRACE_PERIOD) -> int:
    """Run `argv` until it ends or is to end. Returns its exit status, a shell's 128 + N where signal N ended it."""
    command = subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_end_with_supervisor)
    to_end = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which then tells us
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: to_end.set())

    while command.poll() is None and os.getppid() == parent and not to_end.wait(_POLL_INTERVAL):
        pass
    _signal_group(command, signal.SIGTERM)
    deadline = time.monotonic() + grace_period
    while command.poll() is None and time.monotonic() < deadline:
        time.sleep(_POLL_INTERVAL)
    _signal_group(command, signal.SIGKILL)  # the command, or children that outlived it
    status = command.wait()
    return status if status >= 0 else 128 - status


def _end_with_supervisor() -> None:
    """In the command's process: have the system end it if this one is killed, which then can tell nobody."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_SIGNAL_AT_PARENTS_DEATH, signal.SIGTERM)


def _signal_group(command: subprocess.Popen, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(command.pid, number)


if __name__ == "__main__":
    sys.exit(supervise(int(sys.argv[1]), sys.argv[2:]))
