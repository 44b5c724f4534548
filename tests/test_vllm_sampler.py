"""How opponents get onto a server and are played, against a small server that answers as vLLM does, or worse.

Whether a real vLLM server understands the requests is tested in `test_vllm_server.py`, and what becomes of a run whose
server is killed in `test_server_restarts.py`.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
from datasets import Dataset
from fault_server import (
    HANG_UP,
    PARAMS,
    FakeVLLM,
    assert_all_are_the_opponents,
    but_at,
    completion,
    make_requests,
    publish,
)

from spin_trl.generation.sampler import CompletionRequest, SamplerError, SamplingParams
from spin_trl.play.answers import GenerationJob
from spin_trl.run_directory.store import IterationStore


KINDS = pytest.mark.parametrize("lora_rank", [8, None], ids=["lora", "full"])
RESET = "/reset_prefix_cache?reset_running_requests=true"


# What the server can do


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        (FakeVLLM("org/other-model"), r"serves \['org/other-model'\], not 'org/base-model'.*`vllm_server_model`"),
        (FakeVLLM(context_length=19), "has a context of 19 tokens, but at least 20 .*`--max-model-len`"),
        (FakeVLLM(adapters=False), "started without `--enable-lora`.*spin_trl.serve .*--lora-rank 8"),
    ],
    ids=["another model", "too short a context", "no adapters"],
)
def test_server_that_cannot_play_is_refused_with_what_it_is_and_what_to_do(play, fake, message):
    with pytest.raises(SamplerError, match=message):
        play(fake)


@pytest.mark.parametrize(
    ("name", "options"),
    [("base-model", {}), ("/models/base-model", {}), ("anything", {"served_model": "anything"})],
    ids=["without its organisation", "a local copy", "as the user names it"],
)
def test_same_model_under_another_name_is_accepted(play, name, options):
    assert play(FakeVLLM(name, context_length=20), **options).context_length == 20


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
    with pytest.raises(SamplerError, match=f"{variable}.*`python -m spin_trl.serve org/base-model"):
        play(but_at(endpoint, fake, lambda body: (404, {"detail": "Not Found"})), lora_rank=lora_rank)
    assert fake.loaded == []


# How an opponent is published and played

BODY = {
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
SETTINGS = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.2}
OWN = {"top_k": 5, "frequency_penalty": 0.5}


@pytest.mark.parametrize(
    ("settings", "prompt_ids", "changes"),
    [
        ({}, [5, 6, 7], {}),
        ({**SETTINGS, "extra": OWN}, [5, 6, 7], {**SETTINGS, **OWN}),
        ({}, 60 * [5], {"prompt": 60 * [5], "max_tokens": 4}),
    ],
    ids=["the defaults too", "the user's own win", "what a context of 64 leaves"],
)
def test_body_carries_every_sampling_field(faulty, play, settings, prompt_ids, changes):
    sampler = publish(play(), None)
    list(sampler.sample([CompletionRequest((0, 0), prompt_ids, seed=1234)], SamplingParams(16, (2, 3), **settings)))
    assert faulty.bodies("/v1/completions") == [{**BODY, **changes}]


def test_log_probs_are_asked_for_and_returned_only_if_wanted(faulty, play):
    sampler = publish(play(), None)
    (with_logprobs,) = sampler.sample(make_requests(1), PARAMS, logprobs=True)
    (without,) = sampler.sample(make_requests(1), PARAMS)
    assert with_logprobs.logprobs == [-0.5, -1.5, -2.5] and without.logprobs is None
    assert (with_logprobs.key, with_logprobs.finish_reason) == ((0, 0), "stop")
    first, second = faulty.bodies("/v1/completions")
    assert first["logprobs"] == 0 and "logprobs" not in second


def test_each_lora_opponent_is_played_under_a_name_of_its_own_and_the_older_one_is_unloaded(faulty, play, tmp_path):
    fake = FakeVLLM()
    sampler = play(fake)
    loaded = []
    for iteration, checkpoint in [(0, None), (1, tmp_path), (1, tmp_path), (2, tmp_path)]:
        list(publish(sampler, checkpoint, iteration).sample(make_requests(1), PARAMS))
        loaded.append(list(fake.loaded))
    names = ["run-iteration-1", "run-iteration-1", "run-iteration-2"]
    assert [body["model"] for body in faulty.bodies("/v1/completions")] == ["org/base-model", *names]
    assert loaded == [[], *([name] for name in names)]
    assert len(faulty.bodies("/v1/load_lora_adapter")) == 1 + 2  # the first asks whether it can


def test_full_opponent_replaces_the_weights_and_cached_prefixes_are_forgotten(faulty, play, tmp_path):
    sampler = play(lora_rank=None)
    for iteration, checkpoint in enumerate((None, tmp_path)):
        list(publish(sampler, checkpoint, iteration).sample(make_requests(1), PARAMS))
    steps = ["/collective_rpc", RESET, "/v1/completions"]
    probe = "/collective_rpc"
    assert [path for path in faulty.paths() if path in steps] == [probe, *steps, *steps]
    reloads = [body for body in faulty.bodies("/collective_rpc") if body]
    assert [body["method"] for body in reloads] == ["reload_weights"] * 2
    assert [body["kwargs"]["weights_path"] for body in reloads] == ["org/base-model", str(tmp_path)]


def test_opponent_that_the_engine_does_not_take_is_an_error_with_its_words(faulty, play, tmp_path):
    with pytest.raises(SamplerError, match="The lora adapter 'run-iteration-1' cannot be found"):
        play().publish(1, tmp_path / "absent")
    mismatch = 500, {"error": {"message": "shape mismatch"}}
    answer = but_at("/collective_rpc", FakeVLLM(), lambda body: mismatch if body else None)
    with pytest.raises(SamplerError, match="refused POST /collective_rpc. HTTP 500: .*shape mismatch"):
        play(answer, None).publish(1, tmp_path)
    assert len(list(filter(None, faulty.bodies("/collective_rpc")))) == 1


# A server that is restarted


@KINDS
@pytest.mark.parametrize("restarted_at", [None, 0, 1, 37, 39])
def test_restarted_server_gets_the_opponent_again_and_only_that_answers(play, tmp_path, lora_rank, restarted_at):
    """Also where it is restarted before the opponent is selected, which is all that processes but the main one do."""
    fake = FakeVLLM()
    sampler = play(fake, lora_rank, max_concurrent_requests=4)
    sampler.publish(1, tmp_path)
    if restarted_at is None:
        fake.restart()
    sampler.select(1, tmp_path)
    assert_all_are_the_opponents(sampler.sample(make_requests(40, restarted_at, fake.restart), PARAMS), 40)


@pytest.mark.parametrize(
    ("lora_rank", "dies_at", "its_word"),
    [(8, "/v1/load_lora_adapter", 500), (None, "/collective_rpc", 500), (None, RESET, None)],
)
def test_server_that_dies_while_an_opponent_is_loaded_gets_it_again(play, tmp_path, lora_rank, dies_at, its_word):
    """It may say 500, as it does of an opponent that it will never take."""
    fake = FakeVLLM()
    seen, died = [], []

    def answer(path, body):
        seen.append(str(body))
        if path == dies_at and str(tmp_path) in "".join(seen) and not died:
            died.append(path)
            fake.restart()
            if its_word is not None:
                return its_word, {"error": {"message": "EngineCore encountered an issue."}}
        return fake(path, body)

    sampler = publish(play(answer, lora_rank), tmp_path)
    assert len(died) == 1
    assert_all_are_the_opponents(sampler.sample(make_requests(10), PARAMS), 10)


@pytest.mark.parametrize(
    ("lora_rank", "path", "loses", "problem"),
    [
        (None, RESET, FakeVLLM.restart, "restarted.* before .* was in place"),
        (None, RESET, lambda fake: setattr(fake, "version", "another-run-iteration-0:loading:0"), "got other weights"),
        (None, "/v1/completions", FakeVLLM.restart, "no longer those"),
        (8, "/v1/completions", FakeVLLM.restart, "does not exist"),
    ],
    ids=["while it is loaded", "to another run", "full", "lora"],
)
def test_server_that_always_loses_the_opponent_is_an_error(play, tmp_path, lora_rank, path, loses, problem):
    fake = FakeVLLM()
    sampler = play(but_at(path, fake, lambda body: loses(fake)), lora_rank, max_concurrent_requests=1)
    with pytest.raises(SamplerError, match=f"lost the opponent 6 times in a row .*{problem}.*no other run publishes"):
        list(publish(sampler, tmp_path).sample(make_requests(10), PARAMS))


def test_server_that_loses_the_opponent_now_and_then_is_borne_with(play, tmp_path):
    """Ten times in all, but with completions in between."""
    fake = FakeVLLM()
    sampler = publish(play(fake, 8, max_concurrent_requests=1), tmp_path)

    def hundred():
        for one in make_requests(100):
            if one.key[0] % 10 == 5:
                fake.restart()
            yield one

    assert_all_are_the_opponents(sampler.sample(hundred(), PARAMS), 100)


def test_weights_that_another_run_loaded_are_replaced_again(play, connect, faulty, tmp_path):
    other = play(lora_rank=None)
    sampler = publish(connect(faulty.url, lora_rank=None, run_name="another-run"), tmp_path)
    completions = sampler.sample(make_requests(40, 20, lambda: other.publish(0, None)), PARAMS)
    assert_all_are_the_opponents(completions, 40)


@KINDS
def test_processes_that_share_a_server_share_its_recovery(play, connect, faulty, tmp_path, lora_rank):
    """
    The second process asks on while the first has the opponent loaded again. What it got in between is the base
    model's, although the server plays the opponent both before and after; and it need not load it once more.
    """
    fake = FakeVLLM()
    first = publish(play(fake, lora_rank), tmp_path)
    second = connect(faulty.url, lora_rank=lora_rank, max_concurrent_requests=1)
    second.select(1, tmp_path)
    found = []

    def recover():
        fake.restart()
        found.extend(first.sample(make_requests(10), PARAMS))

    assert_all_are_the_opponents(second.sample(make_requests(20, 10, recover), PARAMS), 20)
    assert_all_are_the_opponents(found, 10)
    assert fake.num_reloads == (2 if lora_rank is None else 0)


def test_several_processes_may_load_the_weights_at_once(play, connect, faulty, tmp_path):
    fake = FakeVLLM()
    samplers = [publish(play(fake, None), tmp_path), *(connect(faulty.url, lora_rank=None) for _ in range(3))]
    for sampler in samplers:
        sampler.select(1, tmp_path)
    fake.restart()
    with ThreadPoolExecutor() as pool:
        for answers in pool.map(lambda sampler: list(sampler.sample(make_requests(50), PARAMS)), samplers):
            assert_all_are_the_opponents(answers, 50)


def test_server_that_comes_back_with_another_model_is_refused(play, tmp_path):
    fake = FakeVLLM()

    def restart_with_another():
        fake.restart()
        fake.name = "org/other-model"

    sampler = publish(play(fake), tmp_path)
    with pytest.raises(SamplerError, match=r"serves \['org/other-model'\], not 'org/base-model'"):
        list(sampler.sample(make_requests(10, 5, restart_with_another), PARAMS))


def test_part_with_a_wrong_answer_is_not_written(play, tmp_path):
    """Row 5 of eight, in parts of four. What is wrong with an answer is seen in `test_answers.py`."""
    wrong = but_at("/v1/completions", FakeVLLM(), lambda body: completion(body, 99) if body["prompt"] == [25] else None)
    store = IterationStore(tmp_path / "run")
    job = GenerationJob(store, 1, "generations", PARAMS, part_size=4)
    prompts = Dataset.from_dict({"row": range(8), "prompt_ids": [[20 + row] for row in range(8)]})
    sampler = publish(play(wrong, vocab_size=50, max_concurrent_requests=1), tmp_path)
    with pytest.raises(SamplerError, match="answer to row 5 .*the token id 99, but the model has a vocabulary of 50"):
        job.run(sampler, prompts, job.missing_rows(prompts))
    assert set(store.completions(1, "generations").completed_rows()) <= {0, 1, 2, 3}


# The end of a run


def test_last_adapter_is_unloaded_by_the_process_that_published_it(play, connect, faulty, tmp_path):
    fake = FakeVLLM()
    sampler = publish(publish(play(fake), tmp_path, 1), tmp_path, 2)
    other = connect(faulty.url)
    other.select(2, tmp_path)
    list(other.sample(make_requests(3), PARAMS))
    other.close()
    assert fake.loaded == ["run-iteration-2"]
    sampler.close()
    assert fake.loaded == []


@pytest.mark.parametrize("problem", [HANG_UP, (503, "busy"), (404, "gone")], ids=["gone", "503", "404"])
def test_end_of_a_run_waits_for_no_server_and_is_no_error(play, faulty, tmp_path, problem):
    sampler = publish(play(server_timeout=100_000), tmp_path)
    faulty.requests.clear()
    faulty.answer = lambda path, body: problem
    sampler.close()
    sampler.close()
    assert faulty.paths() == ["/v1/unload_lora_adapter"]
