"""Two processes of one script on the CPU, under a launcher."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
from conftest import ROOT


PATIENCE = 540.0  # seconds until a test gives up; none waits for it when all is well
LIMIT = 60.0  # seconds from a failure until every process has ended
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--tee", "3"]


class TwoProcesses:
    """
    A context: what still runs of them at its end is killed.

    Args:
        folder (`Path`): Takes `output`, in which each line begins with `[default0]` or `[default1]`, and logs.
        *arguments (`str`): Script and arguments.
        launcher (`list[str]`): Python's arguments before them. By default torchrun.
        **variables (`str`): Of the environment.
    """

    def __init__(self, folder: Path, *arguments: str, launcher: list[str] | None = None, **variables: str):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
        launcher = [*TORCHRUN, "--log-dir", str(folder / "logs")] if launcher is None else launcher
        with (folder / "output").open("w") as output:
            self.launcher = subprocess.Popen(
                [sys.executable, *launcher, *arguments],
                cwd=ROOT,
                env={**environment, **variables},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "TwoProcesses":
        return self

    def __exit__(self, *exception) -> None:
        for process in self.running():
            process.kill()
        self.launcher.wait()

    def running(self) -> list[psutil.Process]:
        """The launcher, the processes, and what these have started, as far as it has not ended."""
        try:
            launcher = psutil.Process(self.launcher.pid)
            return [launcher, *launcher.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def wait(self) -> int:
        """The launcher's exit status, once it has ended."""
        return self.launcher.wait(timeout=PATIENCE)

    def wait_for(self, name: str) -> Path:
        """The path of a file, relative to the folder, once somebody has written it."""
        deadline = time.monotonic() + PATIENCE
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline and self.launcher.poll() is None, self.output()[-5000:]
            time.sleep(0.05)
        return self.folder / name

    def output(self, rank: int | None = None) -> str:
        """What both, or one, have written."""
        lines = (self.folder / "output").read_text().splitlines(keepends=True)
        return "".join(line for line in lines if rank is None or line.startswith(f"[default{rank}]"))
