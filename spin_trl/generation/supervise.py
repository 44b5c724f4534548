"""Run a command for as long as the parent lives: `python -m spin_trl.generation.supervise COMMAND...`.

The parent keeps the other end of this process's standard input. When that closes, because the parent closed it or was
killed in whatever way, the command and all its children are ended: SIGTERM, and SIGKILL to what is left after a while.
"""

import os
import signal
import subprocess
import sys
import threading
import time


GRACE_PERIOD = 15.0  # seconds between SIGTERM and SIGKILL


def supervise(argv: list[str]) -> int:
    """Run `argv` until it ends or standard input closes. Returns its exit status."""
    command = subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which then closes our input
    signal.signal(signal.SIGTERM, lambda *_: _end(command))
    threading.Thread(target=_end_with_parent, args=(command,), daemon=True).start()
    status = command.wait()
    _signal_group(command, signal.SIGKILL)  # children that outlived it
    return status


def _end_with_parent(command: subprocess.Popen) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    _end(command)


def _end(command: subprocess.Popen) -> None:
    _signal_group(command, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_PERIOD
    while command.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    _signal_group(command, signal.SIGKILL)


def _signal_group(command: subprocess.Popen, number: signal.Signals) -> None:
    try:
        os.killpg(command.pid, number)
    except ProcessLookupError:
        pass


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[1:]))
