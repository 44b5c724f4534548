"""How opponents get onto a server and are played, against a small server that answers as vLLM does, or worse.

Whether a real vLLM server understands the requests is tested in `test_vllm_server.py`, and what becomes of a run whose
server is killed in `test_server_restarts.py`.
"""

from pathlib import Path

import pytest
from fault_server import HANG_UP, FakeVLLM

from spin_trl.generation.sampler import CompletionRequest, SamplerError, SamplingParams
from spin_trl.generation.vllm_sampler import VLLMSampler


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
    reloads = [body for body in faulty.bodies("/collective_rpc") if body.get("method") == "reload_weights"]
    assert [body["kwargs"] for body in reloads] == [
        {"weights_path": "org/base-model"},
        {"weights_path": str(tmp_path)},
    ]
    order = [path for path, body in faulty.requests if path != "/collective_rpc" or body in reloads]
    order = [path for path in order if path not in ("/health", "/v1/models")]
    assert order == ["/collective_rpc", "/reset_prefix_cache?reset_running_requests=true", "/v1/completions"] * 2
    assert {body["model"] for body in faulty.bodies("/v1/completions")} == {"org/base-model"}


def test_refused_adapter_is_an_error_with_the_servers_message(play, tmp_path):
    sampler = play()
    with pytest.raises(SamplerError, match="The lora adapter 'run-iteration-1' cannot be found"):
        sampler.publish(1, tmp_path / "absent")
