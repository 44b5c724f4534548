"""A managed server that ends by itself, played by a small program in real processes.

That vLLM is started again, and a run goes on with it, is tested in `test_server_restarts.py`.
"""

import os
import signal
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress

import psutil
import pytest

from spin_trl.generation.sampler import SamplerError
from spin_trl.generation.vllm import managed_server
from spin_trl.generation.vllm.http_api import VLLMServer
from spin_trl.generation.vllm.managed_server import ManagedServer
from spin_trl.generation.vllm.serve_command import ServeCommand


PATIENCE = 30.0  # seconds until a test gives up; none waits for it when all is well

# Answers /health as healthy, and what it is called with says how else it fares.
PROGRAM = """
import http.server, os, sys, time
folder, port = sys.argv[1], int(sys.argv[2])
print(f"key {os.environ['VLLM_API_KEY']}, port {port}", flush=True)
if os.path.exists(folder + "/broken"):
    sys.exit("RuntimeError: out of memory")
while os.path.exists(folder + "/slow"):
    time.sleep(0.05)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def make_server(tmp_path, monkeypatch):
    """A factory of managed servers that run `PROGRAM`; they are stopped at the end."""
    servers = []
    monkeypatch.setattr(
        managed_server,
        "serve_command",
        lambda host, port: ServeCommand([sys.executable, "-c", PROGRAM, str(tmp_path), str(port)], {}),
    )

    def make(max_restarts: int, timeout: float = PATIENCE) -> ManagedServer:
        servers.append(ManagedServer(tmp_path / "log", timeout, max_restarts))
        servers[-1].start(show_progress=False)
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


def kill(server: ManagedServer) -> None:
    (program,) = psutil.Process(server._process.pid).children()
    program.kill()
    program.wait(PATIENCE)


def answers(server: ManagedServer) -> bool:
    with suppress(OSError):
        return urllib.request.urlopen(f"{server.base_url}/health", timeout=5).status == 200
    return False


def wait_for(condition) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_server_that_is_killed_is_started_again_at_the_same_address_with_the_same_key(make_server, caplog):
    server = make_server(max_restarts=2)
    address = server.base_url
    for number in (1, 2):
        kill(server)
        assert wait_for(lambda number=number: caplog.text.count("is up again") == number)
        assert answers(server)
        assert f"ended with status 137 and is started again (restart {number} of at most 2)" in caplog.text
    assert server.base_url == address
    log = server.log_path.read_text()
    assert log.count(f"key {server.api_key}, port {address.rpartition(':')[2]}") == 3  # nothing was cut off
    assert log.count("--- 2") == 2 and "is started again (restart 2 of at most 2)" in log
    assert not server.death_notice.exists()


def test_server_whose_supervisor_is_killed_is_ended_and_started_again(make_server, caplog):
    server = make_server(max_restarts=1)
    (program,) = psutil.Process(server._process.pid).children()
    os.kill(server._process.pid, signal.SIGKILL)
    assert wait_for(lambda: "is up again" in caplog.text)
    assert not program.is_running() or program.status() == psutil.STATUS_ZOMBIE
    assert answers(server)


@pytest.mark.parametrize("max_restarts", [0, 1])
def test_server_that_ends_too_often_is_not_started_again_and_every_client_learns_why(make_server, max_restarts, caplog):
    server = make_server(max_restarts)
    client = VLLMServer(server.base_url, server_timeout=PATIENCE, death_notice=server.death_notice)
    client.wait_until_ready()
    for number in range(max_restarts + 1):
        assert wait_for(lambda number=number: caplog.text.count("is up again") == number)
        kill(server)
    with pytest.raises(SamplerError) as error:
        client.wait_until_ready()
    client.close()
    message = str(error.value)
    assert f"started again {max_restarts} time(s), and `vllm_max_restarts` is {max_restarts}" in message
    assert "ended with status 137" in message and f"The end of {server.log_path}:\n" in message
    assert server.api_key in message  # only because this program writes it: the log's own words are shown
    assert wait_for(lambda: server._process is None)


def test_server_that_dies_while_it_is_started_again_is_given_up_at_once(make_server, tmp_path):
    server = make_server(max_restarts=3)
    (tmp_path / "broken").touch()
    kill(server)
    assert wait_for(server.death_notice.exists)
    assert "ended with status 1 while starting" in server.death_notice.read_text()
    assert "RuntimeError: out of memory" in server.death_notice.read_text()
    assert server.num_restarts == 1


def test_server_that_does_not_come_up_again_in_time_is_ended(make_server, tmp_path):
    server = make_server(max_restarts=3)
    server.timeout = 1.0
    (tmp_path / "slow").touch()
    kill(server)
    assert wait_for(server.death_notice.exists)
    assert "was not up after `vllm_server_timeout` (1 s)" in server.death_notice.read_text()
    assert wait_for(lambda: processes_of(server) == [])


def processes_of(server: ManagedServer) -> list[int]:
    port = server.base_url.rpartition(":")[2]
    return [process.pid for process in psutil.process_iter(["cmdline"]) if port in (process.info["cmdline"] or [])]


def test_server_that_is_stopped_while_it_is_started_again_is_gone(make_server, tmp_path):
    server = make_server(max_restarts=3)
    (tmp_path / "slow").touch()
    kill(server)
    assert wait_for(lambda: server.num_restarts == 1)
    server.stop()
    assert processes_of(server) == []
    assert not server.death_notice.exists()


def test_server_that_is_stopped_is_not_started_again(make_server, caplog):
    server = make_server(max_restarts=3)
    server.stop()
    assert server.num_restarts == 0 and processes_of(server) == []
    assert "is started again" not in caplog.text
    assert not server.death_notice.exists()


def test_server_that_is_started_anew_has_not_ended(make_server, tmp_path):
    """A run that is continued finds the notice of the one before."""
    server = make_server(max_restarts=0)
    kill(server)
    assert wait_for(server.death_notice.exists)
    server.stop()
    server.start(show_progress=False)
    assert not server.death_notice.exists() and answers(server)
