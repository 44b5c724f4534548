"""A managed server that rests while nobody needs it, played by a small program in real processes.

That vLLM itself sleeps and wakes, and a run goes on with it, is tested in `test_one_gpu.py`.
"""

import pytest
from managed import kill, processes_of, program_of, wait_for

from spin_trl.generation.sampler import SamplerError
from spin_trl.generation.vllm.rest import ServerRest


@pytest.fixture
def make_rest(make_server, connect):
    """A factory of `ServerRest` over managed servers that run the small program."""

    def make(can_sleep: bool, max_restarts: int = 1, lora_rank: int | None = 8) -> ServerRest:
        server = make_server(max_restarts=max_restarts, can_sleep=can_sleep)
        return ServerRest(server, connect(server.base_url, lora_rank=lora_rank))

    return make


def asked(tmp_path) -> list[str]:
    """What the program was told to do, and whose its weights were said to be."""
    path = tmp_path / "asked"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(("lora_rank", "level"), [(8, 1), (None, 2)], ids=["lora", "full"])
def test_server_keeps_its_weights_asleep_if_adapters_need_them(make_rest, tmp_path, lora_rank, level):
    rest = make_rest(can_sleep=True, lora_rank=lora_rank)
    program = program_of(rest.process)
    for act in (rest.sleep, rest.sleep, rest.wake, rest.wake):
        act()
    assert asked(tmp_path) == [f"/sleep?level={level}", "/wake_up"]
    assert program_of(rest.process) == program


@pytest.mark.parametrize(("how", "num_reloads"), [("nap", 1), ("sleep", 2)])
def test_full_opponent_is_there_after_a_nap_and_loaded_again_after_a_sleep(make_rest, tmp_path, how, num_reloads):
    rest = make_rest(can_sleep=True, lora_rank=None)
    rest.sampler.publish(1, tmp_path)
    getattr(rest, how)()
    rest.wake()
    rest.sampler.publish(1, tmp_path)
    assert asked(tmp_path).count("/reset_prefix_cache?reset_running_requests=true") == num_reloads
    assert f"/sleep?level={num_reloads}" in asked(tmp_path)


def test_server_that_cannot_sleep_naps_not_and_is_ended_to_rest(make_rest, tmp_path):
    rest = make_rest(can_sleep=False)
    address, program = rest.process.base_url, program_of(rest.process)
    rest.nap()
    assert program_of(rest.process) == program
    rest.sleep()
    assert processes_of(rest.process.base_url) == []
    rest.wake()
    assert rest.process.base_url == address and program_of(rest.process) != program
    rest.sampler.publish(1, tmp_path)
    assert rest.process.num_restarts == 0


@pytest.mark.parametrize("can_sleep", [True, False])
def test_server_is_started_again_when_it_ends_awake(make_rest, can_sleep):
    rest = make_rest(can_sleep)
    rest.sleep()
    rest.wake()
    kill(rest.process)
    assert wait_for(lambda: rest.process.num_restarts == 1)


@pytest.mark.parametrize("max_restarts", [0, 1])
def test_server_that_dies_asleep_is_started_again_when_it_is_to_wake_and_not_before(make_rest, max_restarts):
    rest = make_rest(can_sleep=True, max_restarts=max_restarts)
    rest.sleep()
    kill(rest.process)
    assert wait_for(lambda: processes_of(rest.process.base_url) == []) and rest.process.num_restarts == 0
    if max_restarts == 0:
        with pytest.raises(SamplerError, match="had been started again 0 time"):
            rest.wake()
    else:
        rest.wake()
        assert rest.process.num_restarts == 1 and program_of(rest.process).is_running()


@pytest.mark.parametrize("refused", ["sleep", "wake_up"])
def test_server_that_does_not_fall_asleep_or_wake_up_is_replaced_by_one_that_is_awake(make_rest, tmp_path, refused):
    rest = make_rest(can_sleep=True)
    program = program_of(rest.process)
    (tmp_path / "refuse").write_text(refused)
    rest.sleep()
    assert processes_of(rest.process.base_url) == [] if refused == "sleep" else program.is_running()
    rest.wake()
    assert program_of(rest.process) != program
    rest.sampler.publish(1, tmp_path)


def test_server_that_ended_for_good_before_it_was_to_rest_is_an_error(make_rest):
    rest = make_rest(can_sleep=True, max_restarts=0)
    kill(rest.process)
    assert wait_for(lambda: rest.process.has_ended)
    with pytest.raises(SamplerError, match="had been started again 0 time"):
        rest.sleep()


@pytest.mark.parametrize("can_sleep", [True, False])
def test_server_that_rests_ends_with_the_run(make_rest, can_sleep):
    rest = make_rest(can_sleep)
    rest.sleep()
    rest.process.stop()
    assert processes_of(rest.process.base_url) == []
