"""Several servers that play one opponent: who gets which prompts, and what becomes of those of a server that dies."""

import threading
import time
from pathlib import Path

import pytest
from fault_server import HANG_UP, OPPONENT, FakeVLLM, FaultyServer

from spin_trl.generation.sampler import CompletionRequest, SamplerError, SamplingParams
from spin_trl.generation.vllm.sampler import VLLMSampler


PARAMS = SamplingParams(16, (2,))
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


def make_requests(count: int, at: int = -1, action=None):
    for row in range(count):
        if row == at:
            action()
        yield CompletionRequest((row, 0), [20 + row, 6], seed=row)


def publish(sampler: VLLMSampler, path: Path | None, iteration: int = 1) -> None:
    sampler.publish(iteration, path)
    sampler.select(iteration, path)


def assert_all_are_the_opponents(completions, count: int) -> None:
    found = sorted((c.key, c.token_ids) for c in completions)
    assert found == [((row, 0), [20 + row, OPPONENT, 2]) for row in range(count)]


def num_asked(server: FaultyServer) -> int:
    return len(server.bodies("/v1/completions"))


class Mortal:
    """A fake server that can be dead, and has lost the opponent when it comes back."""

    def __init__(self):
        self.fake = FakeVLLM(tells_who_plays=True)
        self.is_dead = False

    def die(self) -> None:
        self.is_dead = True

    def come_back(self) -> None:
        self.fake.restart()
        self.is_dead = False

    def __call__(self, path, body):
        return HANG_UP if self.is_dead else self.fake(path, body)


def slow(answer, seconds: float):
    def answer_slowly(path, body):
        if path == "/v1/completions":
            time.sleep(seconds)
        return answer(path, body)

    return answer_slowly


@KINDS
def test_opponent_is_published_to_all_and_all_of_them_play_it(play_two, tmp_path, lora_rank):
    sampler, servers = play_two(Mortal(), Mortal(), lora_rank=lora_rank)
    publish(sampler, tmp_path)
    completions = sampler.sample(make_requests(200), PARAMS)
    assert_all_are_the_opponents(completions, 200)
    assert num_asked(servers[0]) + num_asked(servers[1]) == 200
    assert min(map(num_asked, servers)) > 20
    for server in servers:
        loaded = [body for _, body in server.requests if str(tmp_path) in str(body)]
        assert len(loaded) == 1


def test_slow_server_gets_less(play_two, tmp_path):
    sampler, servers = play_two(slow(Mortal(), 0.2), Mortal())
    publish(sampler, tmp_path)
    assert_all_are_the_opponents(sampler.sample(make_requests(200), PARAMS), 200)
    assert num_asked(servers[0]) < num_asked(servers[1]) / 2


@KINDS
def test_prompts_of_a_server_that_dies_are_answered_by_the_other(play_two, tmp_path, lora_rank, caplog):
    mortal = Mortal()
    sampler, servers = play_two(slow(mortal, 0.01), slow(Mortal(), 0.01), lora_rank=lora_rank)
    publish(sampler, tmp_path)
    assert_all_are_the_opponents(sampler.sample(make_requests(100, 30, mortal.die), PARAMS), 100)
    assert f"server at {servers[0].url} is left out until it is back" in caplog.text


@KINDS
def test_server_that_comes_back_without_the_opponent_plays_on_only_once_it_has_it_again(
    play_two, tmp_path, lora_rank, caplog
):
    mortal, other = Mortal(), Mortal()
    sampler, servers = play_two(mortal, slow(other, 0.02), lora_rank=lora_rank)
    publish(sampler, tmp_path)
    asked = []

    def revive():
        while "is left out until it is back" not in caplog.text:
            time.sleep(0.01)
        asked.append(num_asked(servers[0]))
        mortal.come_back()

    def die():
        mortal.die()
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
    mortal = Mortal()
    sampler, servers = play_two(mortal, slow(Mortal(), 0.02), lora_rank=lora_rank)
    publish(sampler, tmp_path)
    mortal.die()
    publish(sampler, tmp_path, iteration=2)
    mortal.is_dead = False  # not restarted: it still plays the older one
    before = num_asked(servers[0])
    assert_all_are_the_opponents(sampler.sample(make_requests(200), PARAMS), 200)
    assert num_asked(servers[0]) > before
    assert mortal.fake.num_reloads == 2 if lora_rank is None else "run-iteration-2" in mortal.fake.loaded


def test_all_servers_gone_is_an_error_that_names_each(play_two, tmp_path):
    mortals = [Mortal(), Mortal()]
    sampler, servers = play_two(*mortals, server_timeout=0.5)
    publish(sampler, tmp_path)

    def die():
        for mortal in mortals:
            mortal.die()

    with pytest.raises(SamplerError, match=r"No vLLM server was there within `vllm_server_timeout` \(0.5 s\)") as error:
        list(sampler.sample(make_requests(1000, 30, die), PARAMS))
    with pytest.raises(SamplerError, match="No vLLM server was there") as unpublished:
        sampler.publish(2, tmp_path)
    for server in servers:
        assert f"{server.url}: The vLLM server at" in str(error.value) and server.url in str(unpublished.value)


def test_servers_that_hang_are_an_error(play_two, tmp_path):
    def hang(path, body):
        return servers[0].hang(path, body) if path == "/v1/completions" else fake(path, body)

    fake = FakeVLLM()
    sampler, servers = play_two(hang, hang, request_timeout=0.2, server_timeout=0.3)
    publish(sampler, tmp_path)
    with pytest.raises(SamplerError, match="No vLLM server was there.*`vllm_request_timeout`"):
        list(sampler.sample(make_requests(10), PARAMS))


def test_server_that_hangs_is_left_to_the_other(play_two, tmp_path):
    fake, other = FakeVLLM(), Mortal()

    def hang(path, body):
        return servers[0].hang(path, body) if path == "/v1/completions" else fake(path, body)

    sampler, servers = play_two(hang, other, request_timeout=0.3)
    publish(sampler, tmp_path)
    assert_all_are_the_opponents(sampler.sample(make_requests(40), PARAMS), 40)


def test_answer_that_no_server_may_give_ends_the_work(play_two, tmp_path):
    """What is wrong with it does not pass by asking another one."""
    broken = FakeVLLM()

    def answer(path, body):
        return (400, "no such parameter") if path == "/v1/completions" else broken(path, body)

    sampler, servers = play_two(answer, FakeVLLM())
    publish(sampler, tmp_path)
    with pytest.raises(SamplerError, match=f"{servers[0].url} refused .*no such parameter"):
        list(sampler.sample(make_requests(1000), PARAMS))


def test_error_of_the_prompts_is_raised(play_two, tmp_path):
    def fail():
        raise ZeroDivisionError

    sampler, _ = play_two(FakeVLLM(), FakeVLLM())
    publish(sampler, tmp_path)
    with pytest.raises(ZeroDivisionError):
        list(sampler.sample(make_requests(100, 10, fail), PARAMS))


def test_no_prompts_are_no_work(play_two):
    sampler, _ = play_two(FakeVLLM(), FakeVLLM())
    publish(sampler, None)
    assert list(sampler.sample([], PARAMS)) == []


def test_completions_can_be_left_in_the_middle_and_the_next_phase_is_played(play_two, tmp_path):
    sampler, _ = play_two(slow(Mortal(), 0.05), slow(Mortal(), 0.05))
    publish(sampler, tmp_path)
    completions = sampler.sample(make_requests(100_000), PARAMS)
    next(completions)
    completions.close()
    assert_all_are_the_opponents(sampler.sample(make_requests(20), PARAMS), 20)
    next(sampler.sample(make_requests(100_000), PARAMS))
    sampler.close()


def test_servers_wait_for_a_consumer_that_is_slower_than_they_are(play_two, tmp_path):
    sampler, _ = play_two(FakeVLLM(), FakeVLLM(), max_concurrent_requests=8)
    publish(sampler, tmp_path)
    taken = []

    def counted():
        for request in make_requests(2000):
            taken.append(request)
            yield request

    completions = sampler.sample(counted(), PARAMS)
    next(completions)
    most = -1
    while len(taken) > most:  # until nobody takes any more
        most = len(taken)
        time.sleep(0.5)
    assert 32 <= most < 200
    assert len(list(completions)) == 1999 and len(taken) == 2000


def test_every_server_answers_what_the_publish_check_compares(play_two, tmp_path):
    sampler, servers = play_two(Mortal(), Mortal())
    publish(sampler, tmp_path)
    found = sampler.sample_each(list(make_requests(8)), PARAMS, logprobs=True)
    assert set(found) == {server.url for server in servers}
    for completions in found.values():
        assert_all_are_the_opponents(completions, 8)


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
