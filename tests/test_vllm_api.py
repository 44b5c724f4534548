"""What becomes of a request when the server fails, hangs or refuses, against a small server that does so on purpose."""

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fault_server import BASE, END, HANG_UP, PATIENCE, Answer, CutOff, FakeVLLM, completion

from spin_trl.generation.sampler import SamplerError
from spin_trl.generation.vllm.http_api import UnreachableError, VLLMServer


COMPLETE = "complete", {"prompt": [5]}


@pytest.fixture
def ask(faulty):
    """A function that calls a method of a client of `faulty`, or of another address."""

    def ask(method: str | Callable[[VLLMServer], Awaitable], *arguments, base_url: str | None = None, **options) -> Any:
        async def act_and_close():
            client = VLLMServer(base_url or faulty.url, **{"server_timeout": PATIENCE, "delay": 0.01, **options})
            try:
                return await (method(client) if callable(method) else getattr(client, method)(*arguments))
            finally:
                await client.close()

        return asyncio.run(act_and_close())

    return ask


def in_turn(*answers: Answer) -> Callable[[str, dict | None], Answer]:
    """Each answer once, then the last one for ever."""
    left = list(answers)
    return lambda path, body: left.pop(0) if len(left) > 1 else left[0]


def unused_address() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


# A request that fails

MODELS = {"data": [{"id": "m", "max_model_len": 64}]}
FAILURES = {
    "503": (503, "warming up"),
    "500": (500, "engine died"),
    "502": (502, "<html>Bad gateway</html>"),
    "429": (429, "busy"),
    "408": (408, "slow"),
    "cut before the headers": HANG_UP,
    "cut in the answer": CutOff((200, MODELS)),
    "cut 500": CutOff((500, "engine died")),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_failure_that_may_pass_is_tried_again(faulty, ask, failure):
    faulty.answer = in_turn(failure, failure, (200, MODELS))
    assert ask("served_models") == MODELS["data"]
    assert faulty.paths() == ["/v1/models"] * 3


WORDS = "This prompt has 70 tokens"


@pytest.mark.parametrize(
    ("status", "content"),
    [
        *((status, {"error": {"message": WORDS + 100_000 * "x"}}) for status in (400, 401, 403, 404, 410, 413, 422)),
        (400, b"\xff\xfe\x00" + WORDS.encode()),
    ],
    ids=str,
)
def test_refusal_is_final_and_shows_the_servers_own_message(faulty, ask, status, content):
    """Even where it is no text."""
    faulty.answer = lambda path, body: (status, content)
    with pytest.raises(SamplerError) as error:
        ask("served_models")
    assert f"{faulty.url} refused GET /v1/models. HTTP {status}: " in str(error.value)
    assert WORDS in str(error.value) and len(str(error.value)) < 2000
    assert len(faulty.requests) == 1


NO_MODELS = ["<html>A dashboard</html>", [], {"data": None}, {"data": [{"name": "m"}]}, {"data": [{"id": "m"}]}]


@pytest.mark.parametrize(
    ("question", "content"),
    [
        *(("served_models", content) for content in NO_MODELS),
        *(("weight_version", content) for content in ("", [], {"weight_version": 3})),
    ],
)
def test_answer_that_no_vllm_server_gives_is_refused_with_the_address(faulty, ask, question, content):
    faulty.answer = lambda path, body: (200, content)
    with pytest.raises(SamplerError, match=f"What answers at {faulty.url} is no vLLM server"):
        ask(question)


def test_absent_server_is_named_after_the_server_timeout(ask):
    url, started = unused_address(), time.monotonic()
    named = f"{url} did not answer GET /health.*Cannot connect.*spin_trl.serve.*`vllm_server_base_url`"
    with pytest.raises(UnreachableError, match=named):
        ask("wait_until_ready", base_url=url, server_timeout=0.2)
    assert time.monotonic() - started >= 0.2


def test_server_that_never_recovers_is_given_up_with_its_last_message(faulty, ask):
    faulty.answer = lambda path, body: (503, "out of memory")
    with pytest.raises(UnreachableError, match=r"HTTP 503: out of memory.*`vllm_server_timeout`"):
        ask("wait_until_ready", server_timeout=0.1)
    assert 2 <= len(faulty.requests) <= 11  # ever less often


@pytest.mark.parametrize("question", ["wait_until_ready", "served_models", "adapter_refusal", "reload_refusal"])
def test_server_that_hangs_from_the_start_is_given_up_after_the_server_timeout(faulty, ask, question):
    """Not after the request time-out, which here is as good as never."""
    faulty.answer = faulty.hang
    with pytest.raises(UnreachableError, match=r"no answer within 0.2 s"):
        ask(question, server_timeout=0.2, request_timeout=100_000.0)


async def complete_one_after_another(client: VLLMServer) -> None:
    await client.complete({"prompt": [0]})
    await client.complete({"prompt": [1]})


@pytest.mark.parametrize(
    ("act", "path"),
    [
        (("load_adapter", "a", "/a"), "/v1/load_lora_adapter"),
        (("reload_weights", "/w"), "/collective_rpc"),
        (COMPLETE, "/v1/completions"),
        ((complete_one_after_another,), "/v1/completions"),
    ],
    ids=["load an adapter", "reload weights", "complete", "complete the second time"],
)
def test_work_that_does_not_come_to_an_end_is_a_request_timeout(faulty, ask, act, path):
    is_first = {"prompt": [0]}
    faulty.answer = lambda path, body: completion(body) if body == is_first else faulty.hang(path, body)
    with pytest.raises(UnreachableError, match=rf"no answer within `vllm_request_timeout` \(0.3 s\) to POST {path}"):
        ask(*act, request_timeout=0.3)
    assert len([body for _, body in faulty.requests if body != is_first]) == 1


def test_completion_that_is_queued_behind_others_has_time_as_long_as_they_come(faulty, ask):
    """The server answers one after the other, five in all; each takes less than the limit, and all of them more."""
    one_at_a_time = threading.Lock()

    def answer(path, body):
        with one_at_a_time:
            time.sleep(0.2)
        return completion(body)

    async def ask_five(client):
        return await asyncio.gather(*(client.complete({"prompt": [i]}) for i in range(5)))

    faulty.answer = answer
    assert [choice["token_ids"] for choice in ask(ask_five, request_timeout=0.6)] == [[i, BASE, END] for i in range(5)]


@pytest.mark.parametrize("address", ["localhost:8000", "http://", "http://localhost:port"])
def test_address_that_has_no_sense_is_refused_at_once(ask, address):
    with pytest.raises(SamplerError, match="no address of a server.*`vllm_server_base_url`"):
        ask("served_models", base_url=address, server_timeout=100_000.0)


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_address_may_end_in_the_apis_own_path(faulty, ask, suffix):
    ask("wait_until_ready", base_url=faulty.url + suffix)
    assert faulty.paths() == ["/health"]


@pytest.mark.parametrize(("key", "header"), [("sk-secret", "Bearer sk-secret"), (None, None)])
def test_api_key_is_sent_with_every_request_and_is_in_no_error(faulty, ask, key, header):
    faulty.answer = lambda path, body: (401, {"error": "Unauthorized"})
    for act in (("served_models",), COMPLETE, ("load_adapter", "a", "/a")):
        with pytest.raises(SamplerError, match="VLLM_API_KEY") as error:
            ask(*act, api_key=key)
        assert "sk-secret" not in str(error.value)
    assert len(faulty.requests) >= 3 and faulty.api_keys == {header}


def test_server_that_is_gone_for_good_fails_every_request_at_once_with_the_reason(ask, tmp_path):
    """Of one on a socket, whose keeper leaves word beside it. The server timeout would be longer than the test."""
    (tmp_path / "ended").write_text("it ended thrice: out of memory")
    for act in (COMPLETE, ("wait_until_ready",)):
        with pytest.raises(SamplerError, match="it ended thrice: out of memory"):
            ask(*act, base_url=f"unix:{tmp_path / 'vllm'}", server_timeout=100_000.0)


# Completions


def test_completion_that_the_server_gives_up_is_asked_for_again_for_a_while(faulty, ask):
    aborted = 200, {"choices": [{"token_ids": [5], "finish_reason": "abort"}]}
    faulty.answer = in_turn(aborted, aborted, completion({"prompt": [5]}))
    assert ask(*COMPLETE)["finish_reason"] == "stop"
    assert len(faulty.requests) == 3
    faulty.answer = in_turn(aborted)
    with pytest.raises(SamplerError, match=r"`finish_reason` 'abort'"):
        ask(*COMPLETE, server_timeout=0.1)


@pytest.mark.parametrize("content", [{"choices": []}, {"choices": None}, {"choices": ["text"]}, {"a": 1}, ["text"]])
def test_answer_without_a_completion_is_an_error_that_shows_it(faulty, ask, content):
    faulty.answer = lambda path, body: (200, content)
    with pytest.raises(SamplerError, match=r"no completion where one was asked for: [{\[]"):
        ask(*COMPLETE)


# What was loaded


def test_adapter_that_is_loaded_already_is_left_as_it_is(faulty, ask, tmp_path):
    """Another process may have been faster, or the connection may have broken after the server loaded it."""
    fake, broken = FakeVLLM(), []

    def answer(path, body):
        answer = fake(path, body)
        if path == "/v1/load_lora_adapter" and not broken:
            broken.append(path)
            return HANG_UP
        return answer

    faulty.answer = answer
    ask("load_adapter", "a", str(tmp_path))
    assert fake.loaded == ["a"]


def test_prefixes_that_stay_cached_after_other_weights_are_loaded_are_an_error(faulty, ask):
    faulty.answer = lambda path, body: (200, {"success": False} if "cache" in path else {"results": [None]})
    with pytest.raises(SamplerError, match=r"refused POST /reset_prefix_cache.*success"):
        ask("reload_weights", "/w")


def test_version_of_weights_is_not_set_again_when_the_connection_breaks(faulty, ask):
    """By then the server may be another one."""
    faulty.answer = in_turn(HANG_UP, (200, ""))
    with pytest.raises(UnreachableError):
        ask("set_weight_version", "a")
    assert len(faulty.requests) == 1
