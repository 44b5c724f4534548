"""What becomes of a request when the server fails, hangs or refuses, against a small server that does so on purpose."""

import json
import socket
import threading
import time
from collections.abc import Callable

import pytest
from fault_server import HANG_UP, PATIENCE, Answer, CutOff, FakeVLLM, completion

from spin_trl.generation.sampler import SamplerError
from spin_trl.generation.vllm import http_api as vllm_api
from spin_trl.generation.vllm.attempts import Attempts, Progress


def in_turn(*answers: Answer) -> Callable[[str, dict | None], Answer]:
    """Each answer once, then the last one for ever."""
    left = list(answers)
    return lambda path, body: left.pop(0) if len(left) > 1 else left[0]


def unused_address() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


# A request that fails


@pytest.mark.parametrize(
    "failure",
    [
        (503, "warming up"),
        (500, "engine died"),
        (502, "<html>Bad gateway</html>"),
        (429, "busy"),
        (429, "busy", {"Retry-After": "0.02"}),
        (408, "slow"),
        HANG_UP,
        CutOff((200, {"data": [{"id": "m"}]})),
        CutOff((500, "engine died")),
    ],
    ids=[
        "503",
        "500",
        "502",
        "429",
        "429 with a delay",
        "408",
        "cut before the headers",
        "cut in the answer",
        "cut 500",
    ],
)
def test_failure_that_may_pass_is_tried_again(faulty, connect, failure):
    faulty.answer = in_turn(failure, failure, (200, {"data": [{"id": "m"}]}))
    assert connect().served_models() == [{"id": "m"}]
    assert faulty.paths() == ["/v1/models"] * 3


def test_delay_that_a_busy_server_asks_for_is_heard(faulty, connect, monkeypatch):
    heard, next_delay = [], Attempts.next_delay
    monkeypatch.setattr(
        Attempts, "next_delay", lambda self, problem, asked: heard.append(asked) or next_delay(self, problem, asked)
    )
    faulty.answer = in_turn((429, "busy", {"Retry-After": "0.125"}), (503, "down"), (200, {"data": []}))
    connect().served_models()
    assert heard == ["0.125", None]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 413, 422])
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


def test_answer_that_is_no_text_is_an_error_like_any_other(faulty, connect):
    faulty.answer = lambda path, body: (400, b"\xff\xfe\x00 broken")
    with pytest.raises(SamplerError, match="HTTP 400: .* broken"):
        connect().served_models()


@pytest.mark.parametrize(
    "content", [[], {"object": "list"}, {"data": None}, {"data": ["m"]}, {"data": [{"name": "m"}]}]
)
def test_list_of_models_that_is_none_is_refused_with_the_address(faulty, connect, content):
    faulty.answer = lambda path, body: (200, content)
    with pytest.raises(SamplerError, match=f"What answers at {faulty.url} is no vLLM server"):
        connect().served_models()


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
    assert "Cannot connect" in message and " attempts, the last 0.1 s after the first" in message
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


@pytest.mark.parametrize("address", ["http://", "http://localhost:port"])
def test_address_that_has_no_sense_is_refused_at_once(connect, address):
    with pytest.raises(SamplerError, match="no address of a server"):
        connect(address).wait_until_ready()


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


def test_completion_that_the_server_gives_up_is_asked_for_again(faulty, connect):
    aborted = {"choices": [{"token_ids": [5], "finish_reason": "abort"}]}
    faulty.answer = in_turn((200, aborted), (200, aborted), completion({"prompt": [5]}))
    ((_, choice),) = connect().complete([(0, {"prompt": [5]})])
    assert choice["finish_reason"] == "stop"
    assert len(faulty.requests) == 3


def test_completion_that_the_server_always_gives_up_is_an_error_in_the_end(faulty, connect):
    faulty.answer = lambda path, body: (200, {"choices": [{"token_ids": [5], "finish_reason": "abort"}]})
    with pytest.raises(SamplerError, match=r"within `vllm_server_timeout`.*Last problem: `finish_reason` 'abort'"):
        list(connect(server_timeout=0.1).complete([(0, {"prompt": [5]})]))


@pytest.mark.parametrize(
    "content", [{"choices": []}, {"choices": None}, {"choices": ["text"]}, {"object": "error"}, ["text"]]
)
def test_answer_without_a_completion_is_an_error_that_shows_it(faulty, connect, content):
    faulty.answer = lambda path, body: (200, content)
    with pytest.raises(SamplerError) as error:
        list(connect().complete([(0, {"prompt": [5]})]))
    assert f"no completion where one was asked for: {json.dumps(content)}" in str(error.value)


@pytest.mark.parametrize(
    ("problem", "waiting_for"),
    [
        ((429, "too many requests"), "another attempt after HTTP 429: too many requests"),
        ((500, "engine died"), "another attempt after HTTP 500: engine died"),
        (HANG_UP, "another attempt after ServerDisconnectedError"),
        ("hang", "an answer"),
    ],
    ids=["busy", "broken", "cut off", "hanging"],
)
def test_server_from_which_nothing_comes_back_is_given_up_with_what_the_requests_wait_for(
    faulty, connect, problem, waiting_for
):
    """Each request on its own would still be within its time."""
    faulty.answer = faulty.hang if problem == "hang" else lambda path, body: problem
    client = connect(progress_timeout=0.5, max_concurrent_requests=3)
    with pytest.raises(SamplerError) as error:
        list(client.complete((i, {"prompt": [i]}) for i in range(10)))
    message = str(error.value)
    assert "Not one completion came back" in message and "`vllm_progress_timeout` (0.5 s)" in message
    assert "3 requests are waiting: " in message and f" for {waiting_for}" in message


def test_time_without_a_completion_counts_from_the_last_one(faulty, connect):
    faulty.answer = lambda path, body: completion(body) if body["prompt"] == [0] else faulty.hang(path, body)
    answers = connect(progress_timeout=0.5, max_concurrent_requests=2).complete((i, {"prompt": [i]}) for i in range(4))
    assert next(answers)[0] == 0
    with pytest.raises(SamplerError, match="Not one completion came back"):
        next(answers)


def test_every_completion_is_progress_and_the_consumers_own_time_does_not_count(faulty, connect):
    """A clock that is put forward by 90 of 100 seconds after each completion."""
    faulty.answer = lambda path, body: completion(body)
    progress = Progress(timeout=100.0)
    answers = connect(max_concurrent_requests=1).complete(((i, {"prompt": [i]}) for i in range(5)), progress)
    for _ in answers:
        progress._last -= 90
    assert progress.left() > 90


def test_time_to_come_back_and_to_answer_together_is_the_time_without_progress_by_default(connect):
    assert connect(server_timeout=240, request_timeout=600).progress_timeout == 840


def test_question_about_the_server_does_not_queue_behind_the_completions(faulty, connect, monkeypatch):
    monkeypatch.setattr(vllm_api, "_PROMPT_ANSWER", 5.0)

    def answer(path, body):
        if path == "/v1/completions" and body["prompt"] != [0]:
            faulty.release.wait(PATIENCE)
        return completion(body) if path == "/v1/completions" else (200, {"data": []})

    faulty.answer = answer
    client = connect(max_concurrent_requests=2, server_timeout=1.0)
    answers = client.complete((i, {"prompt": [i]}) for i in range(10))
    next(answers)
    assert client.served_models() == []
    answers.close()


# A server that its keeper has given up


def test_server_that_is_gone_for_good_fails_every_request_at_once_with_the_reason(connect, tmp_path):
    """The server timeout would be half a minute, and twice that with somebody who restarts the server."""
    notice = tmp_path / "notice"
    client = connect(unused_address(), death_notice=notice)
    written = tmp_path / "written"
    written.write_text("it ended thrice: out of memory")
    threading.Timer(0.3, lambda: written.rename(notice)).start()
    started = time.monotonic()
    with pytest.raises(SamplerError, match="it ended thrice: out of memory"):
        list(client.complete((i, {"prompt": [i]}) for i in range(10)))
    with pytest.raises(SamplerError, match="it ended thrice: out of memory"):
        client.wait_until_ready()
    assert time.monotonic() - started < PATIENCE


def test_one_who_restarts_the_server_is_given_twice_the_time_to_say_so(connect, tmp_path):
    """The restart begins after the first failed request and may take the server timeout itself."""
    address = unused_address()
    for death_notice, seconds in ((None, 0.3), (tmp_path / "notice", 0.6)):
        started = time.monotonic()
        with pytest.raises(SamplerError):
            connect(address, server_timeout=0.3, death_notice=death_notice).wait_until_ready()
        assert time.monotonic() - started >= seconds


# What was loaded


def test_adapter_that_is_loaded_already_is_left_as_it_is(faulty, connect, tmp_path):
    """Another process may have been faster, or the connection may have broken after the server loaded it."""
    fake = FakeVLLM()
    fake.loaded.append("a")
    faulty.answer = fake
    connect().load_adapter("a", str(tmp_path))
    assert fake.loaded == ["a"]


def test_adapter_whose_loading_is_answered_by_a_broken_connection_is_loaded_once(faulty, connect, tmp_path):
    fake, broken = FakeVLLM(), []

    def answer(path, body):
        answer = fake(path, body)
        if path == "/v1/load_lora_adapter" and not broken:
            broken.append(path)
            return HANG_UP
        return answer

    faulty.answer = answer
    connect().load_adapter("a", str(tmp_path))
    assert fake.loaded == ["a"]


def test_adapter_that_is_not_loaded_is_unloaded_without_an_error(faulty, connect):
    faulty.answer = FakeVLLM()
    connect().unload_adapter("a")


def test_prefixes_that_stay_cached_after_other_weights_are_loaded_are_an_error(faulty, connect):
    faulty.answer = lambda path, body: (200, {"success": False} if "cache" in path else {"results": [None]})
    with pytest.raises(SamplerError, match=r"refused POST /reset_prefix_cache.*success"):
        connect().reload_weights("/w")


@pytest.mark.parametrize(
    "content",
    ["", "[]", {}, {"results": []}, {"results": ["<repr>"]}, {"results": [None]}, {"results": [[1]]}],
)
def test_server_that_does_not_tell_its_workers_attributes_cannot_be_marked(faulty, connect, content):
    faulty.answer = lambda path, body: (200, content)
    assert not connect().can_be_marked()


def test_mark_counts_only_where_every_worker_carries_it(faulty, connect):
    faulty.answer = lambda path, body: (200, {"results": [["rank", "spin_trl:a", "spin_trl:b"], ["spin_trl:b"]]})
    assert connect().marks() == {"b"}


def test_mark_that_belongs_to_one_server_is_not_set_again_when_the_connection_breaks(faulty, connect):
    """By then the server may be another one."""
    faulty.answer = in_turn(HANG_UP, (200, {"results": [None]}))
    assert connect().try_to_add_mark("a") is False
    assert len(faulty.requests) == 1
