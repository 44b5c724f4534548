"""How opponents get onto a server and are played, against a small server that answers as vLLM does, or worse.

Whether a real vLLM server understands the requests is tested in `test_vllm_server.py`, and what becomes of a run whose
server is killed in `test_server_restarts.py`.
"""

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from datasets import Dataset
from fault_server import HANG_UP, OPPONENT, FakeVLLM

from spin_trl.generation.sampler import Completion, CompletionRequest, SamplerError, SamplingParams
from spin_trl.generation.vllm.sampler import VLLMSampler
from spin_trl.play.answers import GenerationJob
from spin_trl.run_directory.store import IterationStore


# What the server can do


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


@pytest.mark.parametrize(
    ("lora_rank", "endpoint", "variable"),
    [
        (8, "/v1/load_lora_adapter", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        (None, "/collective_rpc", "VLLM_SERVER_DEV_MODE"),
        (None, "/weight_info", "vLLM from 0.31"),
    ],
)
def test_server_that_cannot_load_opponents_is_refused_with_what_it_lacks(play, lora_rank, endpoint, variable):
    fake = FakeVLLM()

    def answer(path, body):
        return (404, {"detail": "Not Found"}) if path == endpoint else fake(path, body)

    with pytest.raises(SamplerError, match=f"{variable}.*`python -m spin_trl.serve org/base-model"):
        play(answer, lora_rank=lora_rank)
    assert fake.loaded == []


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
    settings = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.2}
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
    assert (with_logprobs.key, with_logprobs.token_ids, with_logprobs.finish_reason) == ((0, 0), [5, 2], "stop")
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
    reloads = [body for body in faulty.bodies("/collective_rpc") if body.get("method") == "reload_weights"]
    assert [body["kwargs"] for body in reloads] == [
        {"weights_path": "org/base-model"},
        {"weights_path": str(tmp_path)},
    ]
    reset = "/reset_prefix_cache?reset_running_requests=true"
    order = [path for path, body in faulty.requests if path in (reset, "/v1/completions") or body in reloads]
    assert order == ["/collective_rpc", reset, "/v1/completions"] * 2
    assert {body["model"] for body in faulty.bodies("/v1/completions")} == {"org/base-model"}


def test_refused_adapter_is_an_error_with_the_servers_message(play, tmp_path):
    sampler = play()
    with pytest.raises(SamplerError, match="The lora adapter 'run-iteration-1' cannot be found"):
        sampler.publish(1, tmp_path / "absent")


# A server that is restarted

PARAMS = SamplingParams(16, (2,))


def requests(num: int, at: int | None = None, action=None) -> Iterator[CompletionRequest]:
    """Requests number 0 to `num`; `action` is called when number `at` is taken."""
    for row in range(num):
        if row == at:
            action()
        yield request(row, (20 + row, 6))


def assert_all_are_the_opponents(completions: Iterable[Completion], num: int) -> None:
    """Each exactly once, to its own prompt, and by nobody else."""
    answers = sorted((completion.key, completion.token_ids) for completion in completions)
    assert answers == [((row, 0), [20 + row, OPPONENT, 2]) for row in range(num)]


def play_on(sampler: VLLMSampler, checkpoint: Path, iteration: int = 1) -> VLLMSampler:
    sampler.publish(iteration, checkpoint)
    sampler.select(iteration, checkpoint)
    return sampler


@pytest.mark.parametrize("lora_rank", [8, None], ids=["lora", "full"])
@pytest.mark.parametrize("restarted_at", [0, 1, 37, 39])
def test_restarted_server_gets_the_opponent_again_and_only_that_answers(play, tmp_path, lora_rank, restarted_at):
    fake = FakeVLLM(tells_who_plays=True)
    sampler = play_on(play(fake, lora_rank, max_concurrent_requests=4), tmp_path)
    assert_all_are_the_opponents(sampler.sample(requests(40, restarted_at, fake.restart), PARAMS), 40)


@pytest.mark.parametrize("lora_rank", [8, None], ids=["lora", "full"])
def test_server_that_was_restarted_between_publishing_and_selecting_gets_the_opponent_again(play, tmp_path, lora_rank):
    """Publishing is the main process's; the others only select, and do not know what server it was."""
    fake = FakeVLLM(tells_who_plays=True)
    sampler = play(fake, lora_rank)
    sampler.publish(1, tmp_path)
    fake.restart()
    sampler.select(1, tmp_path)
    assert_all_are_the_opponents(sampler.sample(requests(10), PARAMS), 10)


def test_restart_while_weights_are_loaded_has_them_loaded_again(play, tmp_path):
    fake = FakeVLLM(tells_who_plays=True)
    restarted = []

    def answer(path, body):
        if path == "/reset_prefix_cache?reset_running_requests=true" and not restarted:
            restarted.append(path)
            fake.restart()
        return fake(path, body)

    sampler = play_on(play(answer, None), tmp_path)
    assert fake.num_reloads == 2
    assert_all_are_the_opponents(sampler.sample(requests(10), PARAMS), 10)
    assert fake.num_reloads == 2


@pytest.mark.parametrize("lora_rank", [8, None], ids=["lora", "full"])
def test_engine_that_dies_while_an_opponent_is_loaded_gets_it_again(play, tmp_path, lora_rank):
    """It says 500, as it does of an opponent that it will never take."""
    fake = FakeVLLM(tells_who_plays=True)
    died = []

    def answer(path, body):
        loads = path == "/v1/load_lora_adapter" or body and body.get("method") == "reload_weights"
        if loads and str(tmp_path) in str(body) and not died:
            died.append(path)
            fake.restart()
            return 500, {"error": {"message": "EngineCore encountered an issue."}}
        return fake(path, body)

    sampler = play_on(play(answer, lora_rank), tmp_path)
    assert len(died) == 1
    assert_all_are_the_opponents(sampler.sample(requests(10), PARAMS), 10)


def test_weights_that_the_engine_does_not_take_are_an_error_with_its_words(faulty, play, tmp_path):
    fake = FakeVLLM()

    def answer(path, body):
        if body and body.get("method") == "reload_weights":
            return 500, {"error": {"message": "shape mismatch"}}
        return fake(path, body)

    sampler = play(answer, None)
    with pytest.raises(SamplerError, match="refused POST /collective_rpc. HTTP 500: .*shape mismatch"):
        sampler.publish(1, tmp_path)
    assert len([body for body in faulty.bodies("/collective_rpc") if body.get("method") == "reload_weights"]) == 1


def test_server_that_is_restarted_whenever_weights_are_loaded_is_an_error(play, tmp_path):
    fake = FakeVLLM()

    def answer(path, body):
        if path == "/reset_prefix_cache?reset_running_requests=true":
            fake.restart()
        return fake(path, body)

    with pytest.raises(SamplerError, match="lost the opponent 6 times in a row .*before .* was in place"):
        play_on(play(answer, None), tmp_path)


def test_weights_that_another_run_loaded_are_replaced_again(play, connect, faulty, tmp_path):
    fake = FakeVLLM(tells_who_plays=True)
    other = play(fake, None)
    sampler = play_on(connect(faulty.url, lora_rank=None, run_name="another-run"), tmp_path)
    completions = sampler.sample(requests(40, 20, lambda: other.publish(0, None)), PARAMS)
    assert_all_are_the_opponents(completions, 40)


def test_two_runs_that_load_weights_at_once_are_an_error(play, tmp_path):
    """The other's weights come between a run's own and its look at whether they are there."""
    fake = FakeVLLM()

    def answer(path, body):
        if path == "/reset_prefix_cache?reset_running_requests=true" and fake.weights == str(tmp_path):
            fake.version, fake.weights = "another-run-iteration-0:loading:0", "another opponent"
        return fake(path, body)

    with pytest.raises(SamplerError, match="got other weights, before .*no other run publishes to it"):
        play_on(play(answer, None), tmp_path)


def test_selecting_an_opponent_asks_the_server_nothing(play, faulty, tmp_path):
    """It happens on every process by itself, where an error of one would leave the others waiting."""
    for lora_rank in (8, None):
        sampler = play(lora_rank=lora_rank)
        sampler.publish(1, tmp_path)
        faulty.requests.clear()
        sampler.select(1, tmp_path)
        assert faulty.requests == []


@pytest.mark.parametrize("lora_rank", [8, None], ids=["lora", "full"])
def test_processes_that_share_a_server_share_its_recovery(play, connect, faulty, tmp_path, lora_rank):
    """
    The second process asks on while the first has the opponent loaded again. What it got in between is the base
    model's, although the server plays the opponent both before and after; and it need not load it once more.
    """
    fake = FakeVLLM(tells_who_plays=True)
    first = play_on(play(fake, lora_rank), tmp_path)
    second = connect(faulty.url, lora_rank=lora_rank, max_concurrent_requests=1)
    second.select(1, tmp_path)
    found = []

    def twenty():
        for one in requests(20):
            if one.key == (5, 0):
                fake.restart()
            if one.key == (10, 0):
                found.extend(first.sample(requests(10), PARAMS))
            yield one

    assert_all_are_the_opponents(second.sample(twenty(), PARAMS), 20)
    assert_all_are_the_opponents(found, 10)
    if lora_rank is None:
        assert fake.num_reloads == 2


def test_several_processes_may_load_the_weights_at_once(play, connect, faulty, tmp_path):
    fake = FakeVLLM(tells_who_plays=True)
    samplers = [play_on(play(fake, None), tmp_path)]
    for _ in range(3):
        samplers.append(connect(faulty.url, lora_rank=None))
        samplers[-1].select(1, tmp_path)
    fake.restart()
    found = [[] for _ in samplers]
    threads = [
        threading.Thread(target=lambda s=sampler, f=answers: f.extend(s.sample(requests(50), PARAMS)))
        for sampler, answers in zip(samplers, found, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for answers in found:
        assert_all_are_the_opponents(answers, 50)


@pytest.mark.parametrize("lora_rank", [8, None], ids=["lora", "full"])
def test_server_that_always_loses_the_opponent_is_an_error(play, tmp_path, lora_rank):
    """It is restarted as soon as it has been asked anything."""
    fake = FakeVLLM()

    def answer(path, body):
        if path == "/v1/completions":
            fake.restart()
        return fake(path, body)

    sampler = play_on(play(answer, lora_rank, max_concurrent_requests=1), tmp_path)
    with pytest.raises(SamplerError, match="lost the opponent 6 times in a row .*no other run publishes to it"):
        list(sampler.sample(requests(10), PARAMS))


def test_server_that_loses_the_opponent_now_and_then_is_borne_with(play, tmp_path):
    """Ten times in all, but with completions in between."""
    fake = FakeVLLM(tells_who_plays=True)
    sampler = play_on(play(fake, 8, max_concurrent_requests=1), tmp_path)

    def hundred():
        for one in requests(100):
            if one.key[0] % 10 == 5:
                fake.restart()
            yield one

    assert_all_are_the_opponents(sampler.sample(hundred(), PARAMS), 100)


def test_server_that_comes_back_with_another_model_is_refused(play, tmp_path):
    fake = FakeVLLM()

    def restart_with_another():
        fake.restart()
        fake.name = "org/other-model"

    sampler = play_on(play(fake), tmp_path)
    with pytest.raises(SamplerError, match=r"serves \['org/other-model'\], not 'org/base-model'"):
        list(sampler.sample(requests(10, 5, restart_with_another), PARAMS))


# What is wrong in content


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"token_ids": [99, 2]}, "the token id 99, but the model has a vocabulary of 50"),
        ({"token_ids": None}, "`token_ids` None"),
        ({"token_ids": [5] * 17, "finish_reason": "length"}, "17 tokens, but at most 16"),
        ({"finish_reason": "repetition"}, "`finish_reason` 'repetition'"),
        ({"token_ids": [5, 6]}, "stopped at token 6"),
    ],
)
@pytest.mark.parametrize("lora_rank", [8, None], ids=["lora", "full"])
def test_part_with_a_wrong_answer_is_not_written(play, tmp_path, lora_rank, changes, found):
    """Row 5 of eight, in parts of four."""
    fake = FakeVLLM()

    def answer(path, body):
        status, content = fake(path, body)
        if path == "/v1/completions" and body["prompt"] == [25]:
            content["choices"][0].update(changes)
        return status, content

    store = IterationStore(tmp_path / "run")
    job = GenerationJob(store, 1, "generations", PARAMS, part_size=4)
    prompts = Dataset.from_dict({"row": range(8), "prompt_ids": [[20 + row] for row in range(8)]})
    sampler = play_on(play(answer, lora_rank, vocab_size=50, max_concurrent_requests=1), tmp_path)
    with pytest.raises(SamplerError, match=f"answer to row 5 .*{found}"):
        job.run(sampler, prompts, job.missing_rows(prompts))
    assert set(store.completions(1, "generations").completed_rows()) <= {0, 1, 2, 3}


# The end of a run


def test_last_adapter_is_unloaded_by_the_process_that_published_it(play, connect, faulty, tmp_path):
    fake = FakeVLLM()
    sampler = play_on(play_on(play(fake), tmp_path, 1), tmp_path, 2)
    other = connect(faulty.url)
    other.select(2, tmp_path)
    list(other.sample(requests(3), PARAMS))
    other.close()
    assert fake.loaded == ["run-iteration-2"]
    sampler.close()
    assert fake.loaded == []


@pytest.mark.parametrize("problem", [HANG_UP, (503, "busy"), (404, "gone")], ids=["gone", "503", "404"])
def test_end_of_a_run_waits_for_no_server_and_is_no_error(play, faulty, tmp_path, problem):
    sampler = play_on(play(server_timeout=100_000), tmp_path)
    faulty.requests.clear()
    faulty.answer = faulty.hang if problem == "hang" else lambda path, body: problem
    sampler.close()
    sampler.close()
    assert faulty.paths() == ["/v1/unload_lora_adapter"]


def test_sampler_can_be_closed_in_the_middle_of_its_completions(play, tmp_path):
    """As when the consumer fails: the completions are then left as they are."""
    sampler = play_on(play(max_concurrent_requests=4), tmp_path)
    completions = sampler.sample(requests(100), PARAMS)
    next(completions)
    sampler.close()
    completions.close()
