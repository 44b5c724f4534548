"""What becomes of a request when the server fails, hangs or refuses, against a small server that does so on purpose."""

import socket
import threading
from collections.abc import Callable

import pytest
from fault_server import HANG_UP, PATIENCE, Answer, completion

from spin_trl.generation import vllm_api
from spin_trl.generation.sampler import SamplerError


def in_turn(*answers: Answer) -> Callable[[str, dict | None], Answer]:
    """Each answer once, then the last one for ever."""
    left = list(answers)
    return lambda path, body: left.pop(0) if len(left) > 1 else left[0]


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


def test_completion_that_does_not_come_is_a_request_timeout(faulty, connect):
    faulty.answer = faulty.hang
    client = connect(request_timeout=0.2, progress_timeout=PATIENCE)
    with pytest.raises(
        SamplerError, match=r"no answer within `vllm_request_timeout` \(0.2 s\) to POST /v1/completions"
    ):
        list(client.complete([(0, {"prompt": [0]})]))
    assert len(faulty.requests) == 1


@pytest.mark.parametrize("ask", ["wait_until_ready", "served_models", "adapter_refusal", "reload_refusal"])
def test_server_that_hangs_from_the_start_is_given_up_after_the_server_timeout(faulty, connect, ask):
    """Not after the request time-out, which here is as good as never."""
    faulty.answer = faulty.hang
    with pytest.raises(
        SamplerError, match=r"within `vllm_server_timeout` \(0.2 s\).*Last problem: no answer within 0.2 s"
    ):
        getattr(connect(server_timeout=0.2, request_timeout=100_000.0), ask)()


@pytest.mark.parametrize(
    ("publish", "path"),
    [
        (lambda client: client.load_adapter("a", "/a"), "/v1/load_lora_adapter"),
        (lambda client: client.unload_adapter("a"), "/v1/unload_lora_adapter"),
        (lambda client: client.reload_weights("/w"), "/collective_rpc"),
        (lambda client: client.marks(), "/collective_rpc"),
    ],
    ids=["load an adapter", "unload an adapter", "reload weights", "ask for marks"],
)
def test_server_that_hangs_while_an_opponent_is_published_is_a_request_timeout(faulty, connect, publish, path):
    faulty.answer = faulty.hang
    with pytest.raises(SamplerError, match=rf"no answer within `vllm_request_timeout` \(0.2 s\) to POST {path}"):
        publish(connect(request_timeout=0.2))


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
