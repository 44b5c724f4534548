"""A managed server that rests while nobody needs it, played by a small program in real processes.

That vLLM itself sleeps and wakes, and a run goes on with it, is tested in `test_one_gpu.py`.
"""

import sys
import time

import pytest
from test_managed_restarts import PATIENCE, answers, kill, processes_of, wait_for

from spin_trl.generation.sampler import SamplerError
from spin_trl.generation.vllm import managed_server
from spin_trl.generation.vllm.http_api import VLLMServer
from spin_trl.generation.vllm.managed_server import ManagedServer
from spin_trl.generation.vllm.rest import ServerRest
from spin_trl.generation.vllm.serve_command import ServeCommand


# Answers /health as healthy and writes down what it is asked; with a file "refuse" it answers that path with 500.
PROGRAM = """
import http.server, json, os, sys
folder, port = sys.argv[1], int(sys.argv[2])
if os.path.exists(folder + "/broken"):
    sys.exit("RuntimeError: out of memory")

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        method = json.loads(body).get("method", "") if body else ""
        with open(folder + "/asked", "a") as file:
            file.write(f"{self.path} {method}".strip() + chr(10))
        refused = os.path.exists(folder + "/refuse") and open(folder + "/refuse").read() in self.path
        self.send_response(400 if refused else 200)
        self.end_headers()
        self.wfile.write(b'{"results": [["spin_trl:of-iteration-0"]]}')

http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def make_rest(tmp_path, monkeypatch):
    """A factory of `ServerRest` over managed servers that run `PROGRAM`; they are stopped at the end."""
    made = []

    def make(can_sleep: bool, max_restarts: int = 1, needs_base_weights: bool = True) -> ServerRest:
        monkeypatch.setattr(
            managed_server,
            "serve_command",
            lambda host, port: ServeCommand([sys.executable, "-c", PROGRAM, str(tmp_path), str(port)], {}, can_sleep),
        )
        server = ManagedServer(tmp_path / "log", PATIENCE, max_restarts)
        server.start(show_progress=False)
        client = VLLMServer(server.base_url, server_timeout=PATIENCE, death_notice=server.death_notice)
        made.append(ServerRest(server, client, needs_base_weights))
        return made[-1]

    yield make
    for rest in made:
        rest.process.stop()
        rest.client.close()


def asked(tmp_path) -> list[str]:
    path = tmp_path / "asked"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    ("needs_base_weights", "expected"),
    [
        (True, ["/sleep?level=1", "/wake_up"]),
        (False, ["/collective_rpc __dir__", "/collective_rpc __delattr__", "/sleep?level=2", "/wake_up"]),
    ],
)
def test_server_keeps_its_weights_asleep_if_adapters_need_them_and_forgets_its_opponent_otherwise(
    make_rest, tmp_path, needs_base_weights, expected
):
    rest = make_rest(can_sleep=True, needs_base_weights=needs_base_weights)
    supervisor = rest.process._process.pid
    rest.sleep()
    rest.sleep()
    rest.wake()
    rest.wake()
    assert asked(tmp_path) == expected
    assert rest.process._process.pid == supervisor


def test_a_nap_keeps_the_weights_and_the_opponents_marks(make_rest, tmp_path):
    rest = make_rest(can_sleep=True, needs_base_weights=False)
    rest.nap()
    rest.wake()
    assert asked(tmp_path) == ["/sleep?level=1", "/wake_up"]


def test_server_that_cannot_sleep_naps_not_and_is_ended_to_rest(make_rest, tmp_path, caplog):
    rest = make_rest(can_sleep=False)
    address, supervisor = rest.process.base_url, rest.process._process.pid
    rest.nap()
    assert answers(rest.process) and rest.process._process.pid == supervisor
    rest.sleep()
    assert processes_of(rest.process) == []
    time.sleep(3 * managed_server._POLL_INTERVAL)  # in which a server that is watched would be started again
    assert processes_of(rest.process) == []
    rest.wake()
    assert answers(rest.process) and rest.process.base_url == address
    assert rest.process.num_restarts == 0 and "is started again" not in caplog.text
    assert asked(tmp_path) == []


@pytest.mark.parametrize("end", ["wake", "stop"])
def test_address_of_a_server_that_was_ended_to_rest_is_kept_for_it_until_it_wakes_or_the_run_ends(make_rest, end):
    rest = make_rest(can_sleep=False)
    rest.sleep()
    held = rest.process._held_port  # that it is bound cannot be told from outside: the server's last connections linger
    assert held.getsockname() == ("127.0.0.1", int(rest.process.base_url.rpartition(":")[2]))
    if end == "wake":
        rest.wake()
        assert answers(rest.process)
    else:
        rest.process.stop()
    assert held.fileno() == -1


@pytest.mark.parametrize("can_sleep", [True, False])
def test_server_is_watched_again_when_it_is_awake(make_rest, can_sleep, caplog):
    rest = make_rest(can_sleep)
    rest.sleep()
    rest.wake()
    kill(rest.process)
    assert wait_for(lambda: "is up again" in caplog.text)
    assert answers(rest.process)


def test_server_that_dies_asleep_is_started_again_when_it_is_to_wake_and_not_before(make_rest, caplog):
    rest = make_rest(can_sleep=True)
    rest.sleep()
    kill(rest.process)
    assert wait_for(lambda: rest.process._exit_status() is not None)
    time.sleep(3 * managed_server._POLL_INTERVAL)
    assert processes_of(rest.process) == [] and "is started again" not in caplog.text
    rest.wake()
    assert answers(rest.process)
    assert "ended with status 137 and is started again (restart 1 of at most 1)" in caplog.text


def test_server_that_dies_asleep_too_often_is_an_error(make_rest):
    rest = make_rest(can_sleep=True, max_restarts=0)
    rest.sleep()
    kill(rest.process)
    assert wait_for(lambda: rest.process._exit_status() is not None)
    with pytest.raises(SamplerError, match="`vllm_max_restarts` is 0"):
        rest.wake()


def test_server_that_cannot_be_started_for_its_next_turn_is_an_error_with_its_log(make_rest, tmp_path):
    rest = make_rest(can_sleep=False)
    rest.sleep()
    (tmp_path / "broken").touch()
    with pytest.raises(SamplerError, match=r"ended with status 1 while starting(.|\n)*out of memory"):
        rest.wake()
    assert processes_of(rest.process) == []


@pytest.mark.parametrize("refused", ["sleep", "wake_up"])
def test_server_that_does_not_fall_asleep_or_wake_up_is_replaced_by_one_that_is_awake(
    make_rest, tmp_path, refused, caplog
):
    rest = make_rest(can_sleep=True)
    supervisor = rest.process._process.pid
    (tmp_path / "refuse").write_text(refused)
    rest.sleep()
    if refused == "sleep":
        assert "did not fall asleep, so it is ended" in caplog.text
        assert processes_of(rest.process) == []
    rest.wake()
    if refused == "wake_up":
        assert "did not wake up, so it is started again" in caplog.text
    assert answers(rest.process) and rest.process._process.pid != supervisor


def test_server_that_ended_for_good_before_it_was_to_rest_is_an_error(make_rest):
    rest = make_rest(can_sleep=True, max_restarts=0)
    kill(rest.process)
    assert wait_for(rest.process.death_notice.exists)
    with pytest.raises(SamplerError, match="`vllm_max_restarts` is 0"):
        rest.sleep()


@pytest.mark.parametrize("can_sleep", [True, False])
def test_server_that_rests_ends_with_the_run(make_rest, can_sleep):
    rest = make_rest(can_sleep)
    rest.sleep()
    rest.process.stop()
    assert processes_of(rest.process) == []
