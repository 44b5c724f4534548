"""What becomes of a request when the server fails, hangs or refuses, against a small server that does so on purpose.

Whether a real vLLM server understands the requests is tested in `test_vllm_server.py`.
"""

import json
import socket
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from spin_trl.generation import vllm_api
from spin_trl.generation.sampler import CompletionRequest, SamplerError, SamplingParams
from spin_trl.generation.vllm_api import VLLMServer
from spin_trl.generation.vllm_sampler import VLLMSampler


PATIENCE = 30.0  # seconds until a server that waits for something gives up; none waits for it when all is well
HANG_UP = None  # an answer: close the connection without one

Answer = tuple[int, dict | str] | None


class _QuietServer(ThreadingHTTPServer):
    """Says nothing of clients that hang up, as those that are cancelled do."""

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class FaultyServer:
    """
    An HTTP server on a free loopback port that answers as `answer(path, body)` says, and remembers what it was asked.

    `answer` runs in a thread of its own for each connection, so it may block.
    """

    def __init__(self):
        self.answer: Callable[[str, dict | None], Answer] = lambda path, body: (200, "")
        self.requests: list[tuple[str, dict | None]] = []
        self.api_keys: set[str | None] = set()
        self.release = threading.Event()  # set at the end, for answers that hang
        self._http = _QuietServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]

    def bodies(self, path: str) -> list[dict]:
        return [body for asked, body in self.requests if asked == path]

    def close(self) -> None:
        self.release.set()
        self._http.shutdown()
        self._http.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.reply(None)

            def do_POST(self):
                content = self.rfile.read(int(self.headers["Content-Length"] or 0))
                self.reply(json.loads(content) if content else None)

            def reply(self, body):
                server.requests.append((self.path, body))
                server.api_keys.add(self.headers["Authorization"])
                answer = server.answer(self.path, body)
                self.close_connection = answer is HANG_UP
                if answer is HANG_UP:
                    return
                status, content = answer
                content = (content if isinstance(content, str) else json.dumps(content)).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        return Handler


@pytest.fixture(autouse=True)
def short_delays(monkeypatch):
    monkeypatch.setattr(vllm_api, "_FIRST_RETRY_DELAY", 0.01)


@pytest.fixture
def faulty():
    server = FaultyServer()
    yield server
    server.close()


@pytest.fixture
def connect(faulty):
    """A factory of clients of `faulty`, or of another address; they are closed at the end."""
    clients = []

    def make(base_url: str | None = None, **options) -> VLLMServer:
        clients.append(VLLMServer(base_url or faulty.url, **{"server_timeout": PATIENCE, **options}))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def in_turn(*answers: Answer) -> Callable[[str, dict | None], Answer]:
    """Each answer once, then the last one for ever."""
    left = list(answers)
    return lambda path, body: left.pop(0) if len(left) > 1 else left[0]


def completion(body: dict) -> Answer:
    """An answer that tells the prompt it is for."""
    choice = {"token_ids": [*body["prompt"], 2], "finish_reason": "stop", "logprobs": {"token_logprobs": [-0.5, -1.5]}}
    return 200, {"choices": [choice]}


def unused_address() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


# A request that fails


@pytest.mark.parametrize("failure", [(503, "warming up"), (500, "engine died"), (429, "busy"), (408, "slow"), HANG_UP])
def test_failure_that_may_pass_is_tried_again(faulty, connect, failure):
    faulty.answer = in_turn(failure, failure, (200, {"data": [{"id": "m"}]}))
    assert connect().served_models() == [{"id": "m"}]
    assert faulty.paths() == ["/v1/models"] * 3


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_refusal_is_final_and_shows_the_servers_own_message(faulty, connect, status):
    faulty.answer = lambda path, body: (status, {"error": {"message": "This prompt has 70 tokens"}})
    with pytest.raises(SamplerError) as error:
        connect().served_models()
    assert f"{faulty.url} refused GET /v1/models. HTTP {status}: " in str(error.value)
    assert "This prompt has 70 tokens" in str(error.value)
    assert len(faulty.requests) == 1


def test_answer_of_something_that_is_no_such_server_is_refused_with_its_address(faulty, connect):
    faulty.answer = lambda path, body: (200, "<html>A dashboard</html>")
    with pytest.raises(SamplerError, match=faulty.url):
        connect(server_timeout=0.1).served_models()


def test_long_message_of_the_server_is_cut(faulty, connect):
    faulty.answer = lambda path, body: (400, "x" * 100_000)
    with pytest.raises(SamplerError) as error:
        connect().served_models()
    assert len(str(error.value)) < 2000


def test_absent_server_is_named_after_the_server_timeout(connect):
    url = unused_address()
    with pytest.raises(SamplerError) as error:
        connect(url, server_timeout=0.1).wait_until_ready()
    message = str(error.value)
    assert f"{url} did not answer GET /health within `vllm_server_timeout` (0.1 s)" in message
    assert "Cannot connect" in message
    assert "`python -m spin_trl.serve MODEL`" in message and "`vllm_server_base_url`" in message


def test_server_that_never_recovers_is_given_up_with_its_last_message(faulty, connect):
    faulty.answer = lambda path, body: (503, "out of memory")
    with pytest.raises(SamplerError, match=r"within `vllm_server_timeout`.*Last problem: HTTP 503: out of memory"):
        connect(server_timeout=0.1).wait_until_ready()
    assert len(faulty.requests) > 1


def test_answer_that_does_not_come_is_a_request_timeout(faulty, connect):
    def hang(path, body):
        faulty.release.wait(PATIENCE)
        return 200, ""

    faulty.answer = hang
    with pytest.raises(SamplerError, match=r"no answer within `vllm_request_timeout` \(0.2 s\)"):
        connect(request_timeout=0.2).wait_until_ready()
    assert len(faulty.requests) == 1


def test_address_that_cannot_be_one_is_refused_at_once(connect, monkeypatch):
    async def fail(delay):
        raise AssertionError("it was tried again")

    monkeypatch.setattr(vllm_api.asyncio, "sleep", fail)
    with pytest.raises(SamplerError, match="localhost:8000"):
        connect("localhost:8000").wait_until_ready()


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_address_may_end_in_the_apis_own_path(faulty, connect, suffix):
    connect(faulty.url + suffix).wait_until_ready()
    assert faulty.paths() == ["/health"]


def test_api_key_is_sent_with_every_request(faulty, connect):
    faulty.answer = lambda path, body: completion(body) if path == "/v1/completions" else (200, {"data": []})
    client = connect(api_key="sk-secret")
    client.served_models()
    client.load_adapter("a", "/a")
    client.adapter_refusal()
    list(client.complete([(0, {"prompt": [7]})]))
    assert len(faulty.requests) == 4
    assert faulty.api_keys == {"Bearer sk-secret"}


def test_without_an_api_key_none_is_sent(faulty, connect):
    connect().wait_until_ready()
    assert faulty.api_keys == {None}


def test_api_key_is_in_no_error(faulty, connect):
    faulty.answer = lambda path, body: (401, {"error": "Unauthorized"})
    with pytest.raises(SamplerError) as error:
        connect(api_key="sk-secret").served_models()
    assert "sk-secret" not in str(error.value)


# Many completions at once


def test_every_body_is_answered_under_its_own_key(faulty, connect):
    faulty.answer = lambda path, body: completion(body)
    answers = dict(connect(max_concurrent_requests=3).complete((i, {"prompt": [i]}) for i in range(20)))
    assert {key: choice["token_ids"] for key, choice in answers.items()} == {i: [i, 2] for i in range(20)}


def test_number_of_requests_in_flight_reaches_the_limit_and_stays_there(faulty, connect):
    """No request is answered before four are there, so with fewer at once the test would get stuck."""
    four, lock, in_flight, most = threading.Barrier(4), threading.Lock(), 0, 0

    def answer(path, body):
        nonlocal in_flight, most
        with lock:
            in_flight += 1
            most = max(most, in_flight)
        four.wait(PATIENCE)
        with lock:
            in_flight -= 1
        return completion(body)

    faulty.answer = answer
    answers = list(connect(max_concurrent_requests=4).complete((i, {"prompt": [i]}) for i in range(12)))
    assert len(answers) == 12
    assert most == 4


def test_bodies_are_read_only_as_slots_become_free(faulty, connect):
    taken = []

    def bodies():
        for i in range(1000):
            taken.append(i)
            yield i, {"prompt": [i]}

    faulty.answer = lambda path, body: completion(body)
    answers = connect(max_concurrent_requests=2).complete(bodies())
    for _ in range(3):
        next(answers)
    answers.close()
    assert len(taken) < 20  # three answered, two in flight, and what came in meanwhile


def test_no_bodies_give_no_answers(faulty, connect):
    assert list(connect().complete([])) == []
    assert faulty.requests == []


def test_one_failed_completion_ends_all_others(faulty, connect):
    """Prompt 3 fails while its successors hang: they must neither be waited for nor be followed by more."""

    def answer(path, body):
        if path == "/v1/models":
            return 200, {"data": []}
        if body["prompt"] == [3]:
            return 400, "prompt 3 is too long"
        if body["prompt"][0] > 3:
            faulty.release.wait(PATIENCE)
        return completion(body)

    taken = []
    faulty.answer = answer
    client = connect(max_concurrent_requests=2)
    with pytest.raises(SamplerError, match="prompt 3 is too long"):
        list(client.complete((i, {"prompt": [i]}) for i in range(1000) if taken.append(i) is None))
    assert client.served_models() == []
    assert len(taken) <= 5


def test_error_of_the_bodies_themselves_is_raised(faulty, connect):
    def bodies():
        yield 0, {"prompt": [0]}
        raise KeyError("row 1")

    faulty.answer = lambda path, body: completion(body)
    with pytest.raises(KeyError, match="row 1"):
        list(connect(max_concurrent_requests=2).complete(bodies()))


def test_completions_can_be_left_before_all_are_there(faulty, connect):
    """The others in flight hang, and must not be waited for."""

    def answer(path, body):
        if path == "/v1/completions" and body["prompt"] != [0]:
            faulty.release.wait(PATIENCE)
        return completion(body) if path == "/v1/completions" else (200, {"data": []})

    faulty.answer = answer
    client = connect(max_concurrent_requests=3)
    answers = client.complete((i, {"prompt": [i]}) for i in range(10))
    assert next(answers)[0] == 0
    answers.close()
    assert client.served_models() == []
    assert len(faulty.bodies("/v1/completions")) <= 4


def test_server_that_comes_back_during_the_completions_loses_none(faulty, connect):
    failed, lock = set(), threading.Lock()

    def answer(path, body):
        prompt = tuple(body["prompt"])
        with lock:
            if prompt not in failed:
                failed.add(prompt)
                return HANG_UP if prompt[0] % 2 else (503, "restarting")
        return completion(body)

    faulty.answer = answer
    answers = dict(connect(max_concurrent_requests=4).complete((i, {"prompt": [i]}) for i in range(10)))
    assert sorted(answers) == list(range(10))
    assert all(choice["token_ids"] == [i, 2] for i, choice in answers.items())


def test_closing_twice_is_allowed(connect):
    client = connect()
    client.close()
    client.close()


# What the server can do


class FakeVLLM:
    """Answers as vLLM 0.31 does, as far as a sampler asks before and while it plays."""

    def __init__(self, name: str = "org/base-model", context_length: int = 64, adapters: bool = True):
        self.name = name
        self.context_length = context_length
        self.adapters = adapters
        self.loaded: list[str] = []

    def __call__(self, path: str, body: dict | None) -> Answer:
        base = {"id": self.name, "root": self.name, "parent": None, "max_model_len": self.context_length}
        if path == "/v1/models":
            return 200, {"data": [base, *({"id": name, "parent": self.name} for name in self.loaded)]}
        if path == "/v1/load_lora_adapter":
            return self.load(body)
        if path == "/v1/unload_lora_adapter":
            self.loaded.remove(body["lora_name"])
        if path == "/collective_rpc" and not body:
            return 400, "Missing 'method' in request body"
        return completion(body) if path == "/v1/completions" else (200, "")

    def load(self, body: dict) -> Answer:
        if not self.adapters:
            return 500, {"error": {"message": "Call to add_lora method failed: LoRA is not enabled."}}
        if not Path(body["lora_path"]).is_dir():
            return 404, {"error": {"message": f"The lora adapter '{body['lora_name']}' cannot be found"}}
        if body["lora_name"] in self.loaded:
            return 400, {"error": {"message": f"The lora adapter '{body['lora_name']}' has already been loaded."}}
        self.loaded.append(body["lora_name"])
        return 200, ""


@pytest.fixture
def play(faulty, connect):
    """A factory of samplers that are connected to a server with the given answers."""

    def make(answer=None, lora_rank: int | None = 8, model: str = "org/base-model", **options) -> VLLMSampler:
        faulty.answer = answer or FakeVLLM()
        sampler = VLLMSampler(model, lora_rank, options.pop("served_model", None))
        sampler.connect(connect(**options), "run", min_context_length=20)
        return sampler

    return make


def test_another_model_is_refused_with_both_names(play):
    with pytest.raises(SamplerError) as error:
        play(FakeVLLM("org/other-model"))
    assert "serves ['org/other-model'], not 'org/base-model'" in str(error.value)
    assert "`vllm_server_model`" in str(error.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [("base-model", {}), ("/models/base-model", {}), ("anything", {"served_model": "anything"})],
    ids=["without its organisation", "a local copy", "as the user names it"],
)
def test_same_model_under_another_name_is_accepted(play, name, options):
    assert play(FakeVLLM(name), **options).context_length == 64


def test_context_that_holds_not_even_the_shortest_prompt_is_refused(play):
    with pytest.raises(SamplerError, match="has a context of 19 tokens, but at least 20 .*`--max-model-len`"):
        play(FakeVLLM(context_length=19))
    play(FakeVLLM(context_length=20))


def test_server_without_lora_is_refused_with_its_flag_and_the_command(play):
    with pytest.raises(SamplerError, match="started without `--enable-lora`.*spin_trl.serve .*--lora-rank 8"):
        play(FakeVLLM(adapters=False))


def test_server_without_run_time_loading_is_refused_with_its_variable_and_the_command(play):
    fake = FakeVLLM()

    def answer(path, body):
        return (404, {"detail": "Not Found"}) if path == "/v1/load_lora_adapter" else fake(path, body)

    with pytest.raises(SamplerError, match="without .*`VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`.*--lora-rank 8"):
        play(answer)
    assert fake.loaded == []


def test_server_without_developer_mode_is_refused_for_full_weights_with_its_variable_and_the_command(play):
    fake = FakeVLLM()

    def answer(path, body):
        return (404, {"detail": "Not Found"}) if path == "/collective_rpc" else fake(path, body)

    with pytest.raises(SamplerError, match="`VLLM_SERVER_DEV_MODE=1`.*`python -m spin_trl.serve org/base-model`"):
        play(answer, lora_rank=None)
    assert play(answer, lora_rank=8).context_length == 64  # adapters need no developer mode


@pytest.mark.parametrize("lora_rank", [8, None])
def test_connection_that_breaks_while_the_server_is_examined_is_tried_again(play, lora_rank):
    fake, broken = FakeVLLM(), []

    def answer(path, body):
        if path in ("/v1/load_lora_adapter", "/collective_rpc") and not broken:
            broken.append(path)
            return HANG_UP
        return fake(path, body)

    assert play(answer, lora_rank=lora_rank).context_length == 64
    assert len(broken) == 1


# How an opponent is published and played


def request(row: int = 0, prompt_ids: tuple = (5, 6, 7)) -> CompletionRequest:
    return CompletionRequest((row, 0), list(prompt_ids), seed=1234)


def test_body_carries_every_sampling_field_also_those_left_at_their_defaults(faulty, play):
    sampler = play()
    sampler.select(0, None)
    list(sampler.sample([request()], SamplingParams(max_completion_length=16, end_token_ids=(2, 3))))
    assert faulty.bodies("/v1/completions") == [
        {
            "model": "org/base-model",
            "prompt": [5, 6, 7],
            "seed": 1234,
            "max_tokens": 16,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": [2, 3],
            "return_token_ids": True,
        }
    ]


def test_body_carries_the_settings_and_the_users_own_parameters_win(faulty, play):
    sampler = play()
    sampler.select(0, None)
    settings = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.2}
    params = SamplingParams(16, (2,), **settings, extra={"top_k": 5, "frequency_penalty": 0.5})
    list(sampler.sample([request()], params))
    (body,) = faulty.bodies("/v1/completions")
    expected = {**settings, "top_k": 5, "frequency_penalty": 0.5}
    assert {name: body[name] for name in expected} == expected


def test_answer_is_shortened_to_what_the_context_leaves(faulty, play):
    """A context of 64 holds a prompt of 60 and four more."""
    sampler = play()
    sampler.select(0, None)
    list(sampler.sample([request(prompt_ids=(5,) * 60)], SamplingParams(16, (2,))))
    assert faulty.bodies("/v1/completions")[0]["max_tokens"] == 4


def test_log_probs_are_asked_for_and_returned_only_if_wanted(faulty, play):
    sampler = play()
    sampler.select(0, None)
    params = SamplingParams(16, (2,))
    (with_logprobs,) = sampler.sample([request()], params, logprobs=True)
    (without,) = sampler.sample([request()], params)
    assert with_logprobs.logprobs == [-0.5, -1.5] and without.logprobs is None
    assert (with_logprobs.key, with_logprobs.token_ids, with_logprobs.finish_reason) == ((0, 0), [5, 6, 7, 2], "stop")
    first, second = faulty.bodies("/v1/completions")
    assert first["logprobs"] == 0 and "logprobs" not in second


def play_opponent(sampler: VLLMSampler, iteration: int, checkpoint: Path | None) -> None:
    """Publish, play, and answer one prompt."""
    sampler.publish(iteration, checkpoint)
    sampler.select(iteration, checkpoint)
    list(sampler.sample([request()], SamplingParams(16, (2,))))


def test_each_lora_opponent_is_played_under_a_name_of_its_own_and_the_older_one_is_unloaded(faulty, play, tmp_path):
    fake = FakeVLLM()
    sampler = play(fake)
    loaded = []
    for iteration, checkpoint in enumerate((None, tmp_path, tmp_path)):
        play_opponent(sampler, iteration, checkpoint)
        loaded.append(list(fake.loaded))
    played = [body["model"] for body in faulty.bodies("/v1/completions")]
    assert played == ["org/base-model", "run-iteration-1", "run-iteration-2"]
    assert loaded == [[], ["run-iteration-1"], ["run-iteration-2"]]


def test_lora_opponent_of_the_same_name_that_an_interrupted_run_left_is_replaced(faulty, play, tmp_path):
    fake = FakeVLLM()
    fake.loaded.append("run-iteration-1")
    play_opponent(play(fake), 1, tmp_path)
    assert faulty.bodies("/v1/unload_lora_adapter") == [{"lora_name": "run-iteration-1"}]
    assert fake.loaded == ["run-iteration-1"]


def test_lora_opponent_that_is_published_again_stays_loaded(play, tmp_path):
    fake = FakeVLLM()
    sampler = play(fake)
    play_opponent(sampler, 1, tmp_path)
    play_opponent(sampler, 1, tmp_path)
    assert fake.loaded == ["run-iteration-1"]


def test_full_opponent_replaces_the_weights_and_cached_prefixes_are_forgotten(faulty, play, tmp_path):
    sampler = play(lora_rank=None)
    for iteration, checkpoint in enumerate((None, tmp_path)):
        play_opponent(sampler, iteration, checkpoint)
    reloads = [body for body in faulty.bodies("/collective_rpc") if body]
    assert [body["kwargs"] for body in reloads] == [
        {"weights_path": "org/base-model"},
        {"weights_path": str(tmp_path)},
    ]
    assert {body["method"] for body in reloads} == {"reload_weights"}
    order = [path for path, body in faulty.requests if path != "/collective_rpc" or body][2:]
    assert order == ["/collective_rpc", "/reset_prefix_cache", "/v1/completions"] * 2
    assert {body["model"] for body in faulty.bodies("/v1/completions")} == {"org/base-model"}


def test_refused_adapter_is_an_error_with_the_servers_message(play, tmp_path):
    sampler = play()
    with pytest.raises(SamplerError, match="The lora adapter 'run-iteration-1' cannot be found"):
        sampler.publish(1, tmp_path / "absent")
