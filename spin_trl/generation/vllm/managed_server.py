"""`ManagedServer`: a vLLM server that a run starts for itself, again if need be, and stops at its end."""

import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...run_directory.whole_files import write_text
from ..sampler import SamplerError
from .http_api import death_notice
from .serve_command import ServeCommand
from .supervise import GRACE_PERIOD


logger = logging.getLogger(__name__)

_SUPERVISOR = "spin_trl.generation.vllm.supervise"
_NUM_LOG_LINES_SHOWN = 20
_LONGEST_SOCKET_PATH = 100  # bytes; the system takes 107

# What torchrun and accelerate set for the trainer's processes. The server is not one of them.
_LAUNCHER_PREFIXES = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "ROLE_", "GROUP_")
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LAUNCHER_VARIABLES += ("OMP_NUM_THREADS",)  # torchrun sets it to 1
_LAUNCHER_VARIABLES += ("VLLM_API_KEY",)  # of another server; this one is guarded by its directory


@dataclass
class ManagedServer:
    """
    A vLLM server on a Unix socket, in a directory that only this user may enter.

    A server that ends by itself is started again, on the same socket. Whoever asked it something has to ask again, and
    it plays the base model again: that is for its clients to notice. Once it is not started again, a file beside the
    socket tells them why, see [`death_notice`].

    Args:
        log_path (`Path`): File that takes the server's output.
        timeout (`float`): Seconds within which the server must be up.
        command (`Callable`): Returns the command that serves on the socket at the path that it is given.
        max_restarts (`int`): Number of times that it is started again.
    """

    log_path: Path
    timeout: float
    command: Callable[[str], ServeCommand]
    max_restarts: int = 3

    def __post_init__(self):
        self.num_restarts = 0
        self._socket: Path | None = None
        self._command: ServeCommand | None = None
        self._process: subprocess.Popen | None = None
        self._is_needed = False  # whether it is started again when it ends
        self._lock = threading.RLock()  # around what starts or ends the process

    @property
    def base_url(self) -> str:
        """Address of the server, for [`VLLMServer`]."""
        return f"unix:{self._socket}"

    @property
    def can_sleep(self) -> bool:
        """See [`ServeCommand`]."""
        return self._command.can_sleep

    @property
    def has_ended(self) -> bool:
        """Whether it is gone for good."""
        return death_notice(self._socket).exists()

    def start(self) -> None:
        """
        Start the server, once; wait until it answers, and start it again from then on if it ends.

        Raises:
            `SamplerError`: if it ends or does not come up in time, with the end of its log.
        """
        self._socket = _private_directory() / "vllm"
        self._command = self.command(str(self._socket))
        write_text(self.log_path, f"{self._command}\n")
        self.resume()

    def stop(self) -> None:
        """End the server and everything that it started. Does nothing if it is not running."""
        self.suspend()
        if self._socket is not None:
            shutil.rmtree(self._socket.parent, ignore_errors=True)

    # A server that nobody needs for a while

    def unwatch(self) -> None:
        """Until `resume`, do not start the server again if it ends: nobody needs it, and it would take memory."""
        with self._lock:
            self._is_needed = False

    def suspend(self) -> None:
        """End the server until `resume`. Its address stays."""
        with self._lock:
            self._is_needed = False
            process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(2 * GRACE_PERIOD)  # the supervisor itself waits for one
        except subprocess.TimeoutExpired:
            logger.warning("The vLLM server does not end, not even killed: the system holds it. It is left behind.")
            process.kill()
            process.wait()

    def resume(self) -> None:
        """
        Have the server back. One that was suspended is started; so is one that ended while nobody needed it, which
        counts as a restart.

        Raises:
            `SamplerError`: as `start`, or if there are no restarts left.
        """
        if self._process is None:
            self._launch("is started")
        elif not self._listens():
            self._restart(self._process.wait())
        self._wait_until_ready()

    def _launch(self, occasion: str) -> None:
        env = {**self._command.env, **_clean_environment()}
        self._socket.unlink(missing_ok=True)
        with self._lock, self.log_path.open("a") as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} The vLLM server {occasion}\n")
            log.flush()
            self._process = subprocess.Popen(
                [sys.executable, "-m", _SUPERVISOR, str(os.getpid()), *self._command.argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
            )
            threading.Thread(target=self._watch, args=(self._process,), name="vllm-watcher", daemon=True).start()

    def _watch(self, process: subprocess.Popen) -> None:
        """Start the server again when it ends, or say why it is not."""
        status = process.wait()
        with self._lock:
            if process is not self._process or not self._is_needed:
                return
            try:
                self._restart(status)
            except Exception as error:  # of whatever kind: nobody would notice that nobody watches
                logger.error(str(error))
                write_text(death_notice(self._socket), str(error))

    def _restart(self, status: int) -> None:
        if self.num_restarts == self.max_restarts:
            raise SamplerError(
                f"The vLLM server ended with status {status}, after it had been started again {self.num_restarts} "
                f"time(s), which is as often as it is tried. See why it ended; the same command then "
                f"continues the run. {self._end_of_log()}"
            )
        self.num_restarts += 1
        occasion = (
            f"ended with status {status} and is started again (restart {self.num_restarts} of at most "
            f"{self.max_restarts})"
        )
        logger.warning(f"The vLLM server {occasion}. Its log: {self.log_path}")
        self._launch(occasion)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.timeout
        try:
            while not self._listens():
                if (status := self._process.poll()) is not None:
                    raise SamplerError(
                        f"The vLLM server ended with status {status} while starting. {self._end_of_log()}"
                    )
                if time.monotonic() > deadline:
                    raise SamplerError(
                        f"The vLLM server was not up after `vllm_server_timeout` ({self.timeout:g} s). Raise it if the "
                        f"model takes longer to load. {self._end_of_log()}"
                    )
                time.sleep(0.2)
            self._is_needed = True
        except BaseException:
            self.stop()
            raise

    def _listens(self) -> bool:
        """Whether it takes connections, which vLLM does once it can answer."""
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(str(self._socket)) == 0

    def _end_of_log(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()[-_NUM_LOG_LINES_SHOWN:]
        return f"The end of {self.log_path}:\n" + "\n".join(lines)


def _private_directory() -> Path:
    """A new directory for a socket, whose path the system bounds."""
    is_short = len(os.fsencode(tempfile.gettempdir())) < _LONGEST_SOCKET_PATH - len("/spin-12345678/vllm")
    return Path(tempfile.mkdtemp(prefix="spin-", dir=None if is_short else "/tmp"))


def _clean_environment() -> dict[str, str]:
    dropped = [name for name in os.environ if name in _LAUNCHER_VARIABLES or name.startswith(_LAUNCHER_PREFIXES)]
    return {name: value for name, value in os.environ.items() if name not in dropped}
