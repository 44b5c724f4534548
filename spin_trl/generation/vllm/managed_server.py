"""`ManagedServer`: a vLLM server that a run starts for itself, again if need be, and stops at its end."""

import http.client
import logging
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from ...processes.progress import progress_bar
from ...run_directory.whole_files import write_text
from ..sampler import SamplerError
from .serve_command import ServeCommand, serve_command
from .supervise import GRACE_PERIOD


logger = logging.getLogger(__name__)

_POLL_INTERVAL = 0.2  # seconds
_NUM_LOG_LINES_SHOWN = 20

# What torchrun and accelerate set for the trainer's processes. The server is not one of them.
_LAUNCHER_PREFIXES = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "ROLE_", "GROUP_")
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LAUNCHER_VARIABLES += ("OMP_NUM_THREADS",)  # torchrun sets it to 1


class ManagedServer:
    """
    A vLLM server on a free loopback port, with an API key of its own that no log or file shows.

    A server that ends by itself is started again, at the same address and with the same key. Whoever asked it something
    has to ask again, and it plays the base model again: that is for its clients to notice.

    Args:
        log_path (`Path`): File that takes the server's output.
        timeout (`float`): Seconds within which the server must be up.
        max_restarts (`int`): Number of times that it is started again.
        **options: As for [`serve_command`].
    """

    def __init__(self, log_path: Path, timeout: float, max_restarts: int = 0, **options: Any):
        self.log_path = log_path
        self.timeout = timeout
        self.max_restarts = max_restarts
        self.options = options
        self.api_key = secrets.token_urlsafe(32)
        self.base_url: str | None = None
        self.num_restarts = 0
        self._command: ServeCommand | None = None
        self._process: subprocess.Popen | None = None
        self._watcher: threading.Thread | None = None
        self._held_port: socket.socket | None = None
        self._stopping = threading.Event()
        self._launching = threading.Lock()  # no launch while stopping, and the other way round

    @property
    def death_notice(self) -> Path:
        """File that says why there is no server any more, once nobody starts it again. For clients in any process."""
        return self.log_path.with_name(f"{self.log_path.name}.ended")

    def start(self, show_progress: bool = True) -> None:
        """
        Start the server, wait until it answers, and watch it from then on.

        Raises:
            `SamplerError`: if it ends or does not come up in time, with the end of its log.
        """
        port = _free_port()
        self.base_url = f"http://127.0.0.1:{port}"
        self._command = serve_command(host="127.0.0.1", port=port, **self.options)
        self.num_restarts = 0
        self._stopping.clear()
        write_text(self.log_path, f"{self._command}\n")
        self.death_notice.unlink(missing_ok=True)
        self._launch()
        self._attend(show_progress)

    def stop(self) -> None:
        """End the server and everything that it started. Does nothing if it is not running."""
        self._stopping.set()
        self._end()
        self.unwatch()
        self._release_port()

    @property
    def can_sleep(self) -> bool:
        """Whether `POST /sleep` makes the server free its memory."""
        return self._command is not None and self._command.can_sleep

    # A server that nobody needs for a while

    def unwatch(self) -> None:
        """Until `resume`, do not start the server again if it ends: nobody needs it, and it would take memory."""
        self._stopping.set()
        if self._watcher is not None:
            self._watcher.join()
            self._watcher = None

    def suspend(self) -> None:
        """End the server until `resume`. Its address and key stay."""
        self.stop()
        self._hold_port()

    def resume(self) -> None:
        """
        Watch the server again. One that was suspended is started; so is one that ended while nobody watched, which
        counts as a restart.

        Raises:
            `SamplerError`: as `start`, or if there are no restarts left.
        """
        self._stopping.clear()
        status = self._exit_status()
        if status is not None:
            try:
                self._restart(status)
            except BaseException:
                self.stop()
                raise
        elif self._process is None:
            self._launch(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} The vLLM server is started for the next turn\n")
        self._attend(show_progress=False)

    def _attend(self, show_progress: bool) -> None:
        """Wait until the server answers, and watch it from then on."""
        try:
            self._wait_until_ready(show_progress)
        except BaseException:
            self.stop()
            raise
        self._watcher = threading.Thread(target=self._watch, name="vllm-server-watcher", daemon=True)
        self._watcher.start()

    def _hold_port(self) -> None:
        """Let no other program take the server's port while it is suspended."""
        self._held_port = socket.socket()
        self._held_port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the server has only just left it
        try:
            self._held_port.bind(("127.0.0.1", int(self.base_url.rpartition(":")[2])))
        except OSError as error:
            logger.warning(f"The port of the suspended vLLM server is not kept free for it: {error}")

    def _release_port(self) -> None:
        if self._held_port is not None:
            self._held_port.close()
            self._held_port = None

    def _launch(self, log_line: str = "") -> None:
        env = {**self._command.env, **_clean_environment(), "VLLM_API_KEY": self.api_key}
        with self._launching, self.log_path.open("a") as log:
            if self._stopping.is_set():
                return
            if self._process is not None:
                self._process.stdin.close()
            log.write(log_line)
            log.flush()
            self._release_port()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "spin_trl.generation.vllm.supervise", *self._command.argv],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
            )

    def _end(self) -> None:
        with self._launching:
            process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        process.stdin.close()
        try:
            process.wait(2 * GRACE_PERIOD)  # the supervisor itself waits for one
        except subprocess.TimeoutExpired:
            logger.warning("The vLLM server does not end, not even killed: the system holds it. It is left behind.")
            process.kill()
            process.wait()

    def _wait_until_ready(self, show_progress: bool) -> None:
        started = time.monotonic()
        with progress_bar(
            total=round(self.timeout),
            desc="Waiting for the vLLM server",
            bar_format="{desc}: {n:.0f} s of at most {total} s",
            disable=not show_progress,
        ) as progress:
            while not self._is_ready() and not self._stopping.is_set():
                if (status := self._exit_status()) is not None:
                    raise SamplerError(
                        f"The vLLM server ended with status {status} while starting. The end of {self.log_path}:\n"
                        f"{self._log_tail()}"
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
        except (OSError, http.client.HTTPException):
            return False

    def _exit_status(self) -> int | None:
        process = self._process
        return None if process is None else process.poll()

    # Watching

    def _watch(self) -> None:
        """Start the server again whenever it ends, and say so where it cannot be."""
        try:
            while not self._stopping.wait(_POLL_INTERVAL):
                status = self._exit_status()
                if status is not None and not self._stopping.is_set():
                    self._restart(status)
        except Exception as error:  # of whatever kind: nobody would notice that nobody watches
            logger.error(str(error))
            write_text(self.death_notice, str(error))
            self._end()

    def _restart(self, status: int) -> None:
        if self.num_restarts == self.max_restarts:
            raise SamplerError(
                f"The vLLM server ended with status {status}, after it had been started again {self.num_restarts} "
                f"time(s), and `vllm_max_restarts` is {self.max_restarts}. See why it ended; the same command then "
                f"continues the run. The end of {self.log_path}:\n{self._log_tail()}"
            )
        self.num_restarts += 1
        message = (
            f"The vLLM server ended with status {status} and is started again "
            f"(restart {self.num_restarts} of at most {self.max_restarts})"
        )
        logger.warning(f"{message}. Its log: {self.log_path}")
        self._wait_until_port_is_free()
        started = time.monotonic()
        self._launch(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")
        self._wait_until_ready(show_progress=False)
        if not self._stopping.is_set():
            logger.warning(f"The vLLM server is up again after {time.monotonic() - started:.0f} s.")

    def _wait_until_port_is_free(self) -> None:
        """If the supervisor alone was killed, its command has been told to end and may need a while."""
        deadline = time.monotonic() + GRACE_PERIOD
        while self._is_ready() and time.monotonic() < deadline and not self._stopping.wait(_POLL_INTERVAL):
            pass

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
