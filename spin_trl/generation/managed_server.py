"""`ManagedServer`: a vLLM server that a run starts for itself and stops at its end, whatever that end is."""

import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from ..atomic_files import write_text
from ..progress import progress_bar
from .sampler import SamplerError
from .serve_command import serve_command


_NUM_LOG_LINES_SHOWN = 20

# What torchrun and accelerate set for the trainer's processes. The server is not one of them.
_LAUNCHER_PREFIXES = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "ROLE_", "GROUP_")
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LAUNCHER_VARIABLES += ("OMP_NUM_THREADS",)  # torchrun sets it to 1


class ManagedServer:
    """
    A vLLM server on a free loopback port, with an API key of its own that no log or file shows.

    Args:
        log_path (`Path`): File that takes the server's output.
        timeout (`float`): Seconds within which the server must be up.
        **options: As for [`serve_command`].
    """

    def __init__(self, log_path: Path, timeout: float, **options: Any):
        self.log_path = log_path
        self.timeout = timeout
        self.options = options
        self.api_key = secrets.token_urlsafe(32)
        self.base_url: str | None = None
        self._process: subprocess.Popen | None = None

    def start(self, show_progress: bool = True) -> None:
        """
        Start the server and wait until it answers.

        Raises:
            `SamplerError`: if it ends or does not come up in time, with the end of its log.
        """
        port = _free_port()
        command = serve_command(host="127.0.0.1", port=port, **self.options)
        env = {**command.env, **_clean_environment(), "VLLM_API_KEY": self.api_key}
        write_text(self.log_path, f"{command}\n")
        with self.log_path.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "spin_trl.generation.supervise", *command.argv],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
            )
        self.base_url = f"http://127.0.0.1:{port}"
        try:
            self._wait_until_ready(show_progress)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server and everything that it started. Does nothing if it is not running."""
        if self._process is None:
            return
        self._process.terminate()
        self._process.stdin.close()
        self._process.wait()
        self._process = None

    def _wait_until_ready(self, show_progress: bool) -> None:
        started = time.monotonic()
        with progress_bar(
            total=round(self.timeout),
            desc="Waiting for the vLLM server",
            bar_format="{desc}: {n:.0f} s of at most {total} s",
            disable=not show_progress,
        ) as progress:
            while not self._is_ready():
                if self._process.poll() is not None:
                    raise SamplerError(
                        f"The vLLM server ended with status {self._process.returncode} while starting. The end of "
                        f"{self.log_path}:\n{self._log_tail()}"
                    )
                elapsed = time.monotonic() - started
                if elapsed > self.timeout:
                    raise SamplerError(
                        f"The vLLM server was not up after `vllm_server_timeout` ({self.timeout:g} s). Raise it if the "
                        f"model takes longer to load. The end of {self.log_path}:\n{self._log_tail()}"
                    )
                progress.update(elapsed - progress.n)
                time.sleep(0.5)

    def _is_ready(self) -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback, whatever the proxy
        try:
            with opener.open(f"{self.base_url}/health", timeout=5) as response:
                return response.status == 200
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def _log_tail(self) -> str:
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-_NUM_LOG_LINES_SHOWN:])


def _clean_environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHER_VARIABLES and not name.startswith(_LAUNCHER_PREFIXES)
    }


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
