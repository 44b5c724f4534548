"""Several servers that play one opponent: who gets which prompts, and what becomes of those of a server that dies."""

import threading
import time

import pytest
from fault_server import PARAMS, FakeVLLM, FaultyServer, assert_all_are_the_opponents, but_at, make_requests, publish

from spin_trl.generation.sampler import SamplerError
from spin_trl.generation.vllm.sampler import VLLMSampler


KINDS = pytest.mark.parametrize("lora_rank", [8, None], ids=["lora", "full"])


@pytest.fixture
def play_two(connect):
    """A factory of samplers that are connected to two servers with the given answers; also the servers."""
    servers = [FaultyServer(), FaultyServer()]

    def make(*answers, lora_rank: int | None = 8, **options) -> tuple[VLLMSampler, list[FaultyServer]]:
        for server, answer in zip(servers, answers, strict=True):
            server.answer = answer
        urls = [server.url for server in servers]
        return connect(*urls, lora_rank=lora_rank, **{"max_concurrent_requests": 4, **options}), servers

    yield make
    for server in servers:
        server.release.set()
    for server in servers:
        server.close()


def num_asked(server: FaultyServer) -> int:
    return len(server.bodies("/v1/completions"))


def slow(fake: FakeVLLM, seconds: float):
    return but_at("/v1/completions", fake, lambda body: time.sleep(seconds))


@KINDS
def test_opponent_is_published_to_all_and_all_of_them_play_it(play_two, tmp_path, lora_rank):
    sampler, servers = play_two(FakeVLLM(), FakeVLLM(), lora_rank=lora_rank)
    publish(sampler, tmp_path)
    assert list(sampler.sample([], PARAMS)) == []
    assert_all_are_the_opponents(sampler.sample(make_requests(200), PARAMS), 200)
    assert sum(map(num_asked, servers)) == 200 and min(map(num_asked, servers)) > 20
    compared = sampler.sample_each(list(make_requests(8)), PARAMS, logprobs=True)  # by the publish check
    assert set(compared) == {server.url for server in servers}
    for completions in compared.values():
        assert_all_are_the_opponents(completions, 8)
    for server in servers:
        assert len([body for _, body in server.requests if str(tmp_path) in str(body)]) == 1


def test_slow_server_gets_less(play_two, tmp_path):
    sampler, servers = play_two(slow(FakeVLLM(), 0.2), FakeVLLM())
    publish(sampler, tmp_path)
    assert_all_are_the_opponents(sampler.sample(make_requests(200), PARAMS), 200)
    assert num_asked(servers[0]) < num_asked(servers[1]) / 2


@KINDS
def test_server_that_dies_is_left_out_and_plays_on_only_once_it_has_the_opponent_again(
    play_two, tmp_path, lora_rank, caplog
):
    mortal = FakeVLLM()
    sampler, servers = play_two(slow(mortal, 0.01), slow(FakeVLLM(), 0.02), lora_rank=lora_rank)
    publish(sampler, tmp_path)
    asked = []

    def revive():
        while f"server at {servers[0].url} is left out until it is back" not in caplog.text:
            time.sleep(0.01)
        asked.append(num_asked(servers[0]))
        mortal.restart()
        mortal.is_dead = False

    def die():
        mortal.is_dead = True
        threading.Thread(target=revive).start()

    def endless():
        """Until the server that died is seen to have answered again."""
        for row, one in enumerate(make_requests(100_000, 30, die)):
            if f"server at {servers[0].url} is back" in caplog.text and row > 60:
                return
            yield one

    with caplog.at_level("WARNING"):
        found = list(sampler.sample(endless(), PARAMS))
    assert_all_are_the_opponents(found, len(found))
    assert num_asked(servers[0]) > asked[0]


@KINDS
def test_server_that_missed_an_opponent_gets_it_when_it_is_back(play_two, tmp_path, lora_rank):
    mortal = FakeVLLM()
    sampler, servers = play_two(mortal, slow(FakeVLLM(), 0.02), lora_rank=lora_rank)
    publish(sampler, tmp_path)
    mortal.is_dead = True
    publish(sampler, tmp_path, iteration=2)
    mortal.is_dead = False  # not restarted: it still plays the older one
    before = num_asked(servers[0])
    assert_all_are_the_opponents(sampler.sample(make_requests(200), PARAMS), 200)
    assert num_asked(servers[0]) > before
    assert mortal.num_reloads == 2 if lora_rank is None else "run-iteration-2" in mortal.loaded


def test_all_servers_gone_is_an_error_that_names_each(play_two, tmp_path):
    fakes = [FakeVLLM(), FakeVLLM()]
    sampler, servers = play_two(*fakes, server_timeout=0.5)
    publish(sampler, tmp_path)

    def die():
        for fake in fakes:
            fake.is_dead = True

    with pytest.raises(SamplerError, match=r"No vLLM server was there within `vllm_server_timeout` \(0.5 s\)") as error:
        list(sampler.sample(make_requests(1000, 30, die), PARAMS))
    with pytest.raises(SamplerError, match="No vLLM server was there") as unpublished:
        sampler.publish(2, tmp_path)
    for server in servers:
        assert f"{server.url}: The vLLM server at" in str(error.value) and server.url in str(unpublished.value)


def test_server_that_hangs_is_left_to_the_other_and_two_that_hang_are_an_error(play_two, tmp_path, faulty):
    hangs = but_at("/v1/completions", FakeVLLM(), lambda body: faulty.hang("", body))
    sampler, servers = play_two(hangs, FakeVLLM(), request_timeout=0.3, server_timeout=0.3)
    publish(sampler, tmp_path)
    assert_all_are_the_opponents(sampler.sample(make_requests(40), PARAMS), 40)
    servers[1].answer = hangs
    with pytest.raises(SamplerError, match="No vLLM server was there.*`vllm_request_timeout`"):
        list(sampler.sample(make_requests(10), PARAMS))


def test_what_does_not_pass_by_asking_another_server_ends_the_work(play_two, tmp_path):
    def fail():
        raise ZeroDivisionError

    refuses = but_at("/v1/completions", FakeVLLM(), lambda body: (400, "no such parameter"))
    sampler, servers = play_two(refuses, FakeVLLM())
    publish(sampler, tmp_path)
    with pytest.raises(SamplerError, match=f"{servers[0].url} refused .*no such parameter"):
        list(sampler.sample(make_requests(1000), PARAMS))
    servers[0].answer = FakeVLLM()
    with pytest.raises(ZeroDivisionError):
        list(sampler.sample(make_requests(100, 10, fail), PARAMS))


def test_completions_can_be_left_in_the_middle_and_the_next_phase_is_played(play_two, tmp_path):
    sampler, servers = play_two(slow(FakeVLLM(), 0.05), slow(FakeVLLM(), 0.05))
    publish(sampler, tmp_path)
    completions = sampler.sample(make_requests(100_000), PARAMS)
    next(completions)
    completions.close()
    asked = sum(map(num_asked, servers))
    time.sleep(0.2)
    assert sum(map(num_asked, servers)) == asked
    assert_all_are_the_opponents(sampler.sample(make_requests(20), PARAMS), 20)
    completions = sampler.sample(make_requests(100_000), PARAMS)
    next(completions)
    sampler.close()  # as when the consumer fails
    completions.close()


def test_servers_wait_for_a_consumer_that_is_slower_than_they_are(play_two, tmp_path):
    sampler, servers = play_two(FakeVLLM(), FakeVLLM(), max_concurrent_requests=8)
    publish(sampler, tmp_path)
    taken = []

    def counted():
        for request in make_requests(2000):
            taken.append(request)
            yield request

    completions = sampler.sample(counted(), PARAMS)
    next(completions)
    time.sleep(0.5)
    assert 32 <= len(taken) < 200 and sum(map(num_asked, servers)) <= len(taken)
    assert len(list(completions)) == 1999 and len(taken) == 2000


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (FakeVLLM("org/other-model"), r"server at http://\S+ serves \['org/other-model'\], not 'org/base-model'"),
        (FakeVLLM(context_length=65), r"contexts of different lengths: {'http://\S+': 64, 'http://\S+': 65}"),
    ],
    ids=["another model", "another context"],
)
def test_servers_that_differ_are_refused(play_two, other, message):
    with pytest.raises(SamplerError, match=message):
        play_two(FakeVLLM(), other)


def test_server_that_is_not_there_at_the_start_is_named(connect):
    with pytest.raises(SamplerError, match="http://127.0.0.1:(9|10) did not answer"):
        connect("http://127.0.0.1:9", "http://127.0.0.1:10", server_timeout=0.1)
