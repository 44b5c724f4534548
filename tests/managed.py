"""What tests of managed servers share: a small program in place of vLLM, and the processes of a server."""

import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from spin_trl.generation.vllm.managed_server import ManagedServer
from spin_trl.generation.vllm.serve_command import ServeCommand


PATIENCE = 30.0  # seconds until a test gives up; none waits for it when all is well
PROGRAM = str(Path(__file__).with_name("fake_program.py"))


def fake_server(
    folder: Path, max_restarts: int = 0, timeout: float = PATIENCE, can_sleep: bool = False
) -> ManagedServer:
    """A managed server that runs `fake_program.py`, with files in `folder` that say how it fares."""

    def command(uds: str) -> ServeCommand:
        return ServeCommand([sys.executable, PROGRAM, str(folder), uds], {}, can_sleep)

    return ManagedServer(folder / "log", timeout, command, max_restarts)


def processes_of(address: str) -> list[psutil.Process]:
    """The program and what watches over it, by the socket in their command lines."""
    path = address.removeprefix("unix:")
    return [process for process in psutil.process_iter(["cmdline"]) if path in (process.info["cmdline"] or [])]


def program_of(server: ManagedServer) -> psutil.Process:
    (program,) = [process for process in processes_of(server.base_url) if PROGRAM in process.info["cmdline"][:2]]
    return program


def kill(server: ManagedServer) -> None:
    program = program_of(server)
    program.kill()
    program.wait(PATIENCE)


def listens(address: str) -> bool:
    """Whether the server at the address takes connections."""
    if address.startswith("unix:"):
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(address.removeprefix("unix:")) == 0
    url = urlsplit(address)
    with socket.socket() as client:
        return client.connect_ex((url.hostname, url.port)) == 0


def wait_for(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


class Servers:
    """The server processes that a test has started, by a variable in their environment that is this test's alone."""

    VARIABLE = "SPIN_TRL_TEST"

    def __init__(self):
        self.name = f"{os.getpid()}-{time.monotonic_ns()}"

    def running(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter(["cmdline"]):
            try:
                is_ours = process.environ().get(self.VARIABLE) == self.name
            except psutil.Error:  # it has ended meanwhile, or is somebody else's
                continue
            if is_ours and process.pid != os.getpid():
                found.append(process)
        return found

    def kill(self) -> None:
        """End the process that answers, as the system does when memory runs out."""
        (vllm,) = [process for process in self.running() if process.parent() in self.running()[:1]]
        vllm.kill()
        vllm.wait(60)
