"""Run a command for as long as the parent lives: `python -m spin_trl.generation.vllm.supervise COMMAND...`.

When this process is told to end (SIGTERM, SIGHUP), when its standard input closes, or when its parent is gone in
whatever way, the command and all its children are ended: SIGTERM, and SIGKILL to what is left after a while.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time


GRACE_PERIOD = 15.0  # seconds between SIGTERM and SIGKILL
_POLL_INTERVAL = 0.1  # seconds
_SET_SIGNAL_AT_PARENTS_DEATH = 1  # PR_SET_PDEATHSIG of prctl(2)


def supervise(argv: list[str], grace_period: float = GRACE_PERIOD) -> int:
    """Run `argv` until it ends or is to end. Returns its exit status, a shell's 128 + N where signal N ended it."""
    parent = os.getppid()
    command = subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_end_with_supervisor)
    to_end = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which then tells us
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: to_end.set())
    threading.Thread(target=_wait_for_end_of_input, args=(to_end,), daemon=True).start()

    while command.poll() is None and not to_end.wait(_POLL_INTERVAL):
        if os.getppid() != parent:
            to_end.set()
    if command.poll() is None:
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


def _wait_for_end_of_input(to_end: threading.Event) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    to_end.set()


def _signal_group(command: subprocess.Popen, number: signal.Signals) -> None:
    try:
        os.killpg(command.pid, number)
    except ProcessLookupError:
        pass


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[1:]))
