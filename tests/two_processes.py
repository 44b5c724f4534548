"""Two processes of one script on the CPU, without a launcher: nothing but the script itself ends them."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT


PATIENCE = 300.0  # seconds until a test gives up; none waits for it when all is well


class TwoProcesses:
    """
    Args:
        folder (`Path`): Takes what they write, `output-0` and `output-1`.
        *arguments (`str`): Script and arguments.
    """

    def __init__(self, folder: Path, *arguments: str):
        self.folder = folder
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        group |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, *arguments],
                env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=(folder / f"output-{rank}").open("w"),
                stderr=subprocess.STDOUT,
            )
            for rank in range(2)
        ]

    def wait(self) -> list[int]:
        """Exit statuses, once both have ended."""
        deadline = time.monotonic() + PATIENCE
        try:
            return [process.wait(timeout=deadline - time.monotonic()) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
                process.wait()

    def wait_for(self, name: str) -> None:
        """Return when the script has written a file of this name."""
        deadline = time.monotonic() + PATIENCE
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline and self.processes[0].poll() is None, self.output()
            time.sleep(0.05)

    def output(self, rank: int | None = None) -> str:
        ranks = range(2) if rank is None else [rank]
        return "\n".join((self.folder / f"output-{rank}").read_text() for rank in ranks)
