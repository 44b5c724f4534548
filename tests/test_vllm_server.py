"""Self-play against a real vLLM server that somebody else runs (`vllm_server_base_url`)."""

from pathlib import Path

import pytest
from conftest import all_completions
from datasets import Dataset
from peft import LoraConfig
from real_server import RealServer, by_key, make_requests
from safetensors.torch import load_file

from spin_trl import SPINTrainer
from spin_trl.generation.sampler import CompletionRequest, SamplerError, SamplingParams


LORA = {"r": 8, "target_modules": "all-linear"}


@pytest.fixture
def make_run(build_trainer):
    """A factory of trainers against a server, with an adapter or, with `lora=None`, with full weights."""

    def make(server: RealServer, lora: dict | None = LORA, **given) -> SPINTrainer:
        adapter = {} if lora is None else {"peft_config": LoraConfig(**lora)}
        return build_trainer(**{**server.fields, **adapter, **given})

    return make


# The opponent


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_every_iterations_opponent_is_another_and_the_server_plays_it(kind, request, make_run):
    server = request.getfixturevalue(f"{kind}_server")
    fields = {"learning_rate": 1e-2, "save_strategy": "epoch", "report": True}
    trainer = make_run(server, LORA if kind == "lora" else None, **fields)
    trainer.train()
    for iteration in range(3):
        assert trainer.store.read_metrics(iteration)["publish_check_difference"] < 1e-4
        assert trainer.store.read_pairs(iteration)["row"][:48] == list(range(48))
    assert not trainer.store.path(0, "opponent").exists()  # it is the base model
    folders = [trainer.store.path(iteration, "opponent") for iteration in (1, 2)]
    first, second = (load_file(next(folder.glob("*.safetensors"))) for folder in folders)
    assert any((first[name] - second[name]).abs().max() > 1e-3 for name in first)
    kinds = {path.suffix for folder in folders for path in folder.iterdir()}
    assert kinds <= {".json", ".safetensors", ".jinja", ".md"}
    files = [path for path in Path(trainer.args.output_dir).rglob("*") if path.is_file()]
    assert not [path for path in files if server.api_key.encode() in path.read_bytes()]


def test_server_is_brought_back_to_the_base_model_by_the_next_run(full_server, make_run, tmp_path):
    """A run leaves its last opponent on the server. The next one must not start against it."""
    for name in ("first", "second"):
        make_run(full_server, lora=None, num_iterations=2, learning_rate=1e-2, output_dir=str(tmp_path / name)).train()


def test_publish_check_catches_a_server_left_on_an_old_opponent(full_server, make_run, faulty):
    """Something before the server says that it has reloaded its weights, and it has not."""

    def answer(path, body):
        if body is not None and "opponent" in str(body.get("kwargs")):
            return 200, {"results": [None]}
        if path.startswith("/reset_prefix_cache"):
            return 200, {"success": True}
        return full_server.ask(path, body)

    faulty.answer = answer
    trainer = make_run(full_server, lora=None, vllm_server_base_url=faulty.url, learning_rate=1e-2)
    with pytest.raises(
        SamplerError, match=r"does not play iteration 1's opponent: over \d+ tokens of 8 .* completions"
    ):
        trainer.train()


def test_publish_check_works_where_answers_would_be_truncated(lora_server, make_run):
    """Prompts of 17 tokens and a `max_length` of 20 leave 3 tokens of each answer to be scored."""
    dataset = Dataset.from_dict({"prompt": ["a" * 16, "b" * 16], "completion": ["AA B K", "B AA T"]})
    trainer = make_run(lora_server, train_dataset=dataset, num_iterations=1, max_length=20)
    trainer.train()
    assert trainer.store.read_metrics(0)["publish_check_difference"] < 1e-4


def test_adapter_of_too_high_a_rank_is_refused_with_the_servers_words(lora_server, make_run):
    """The server takes rank 8."""
    trainer = make_run(lora_server, {**LORA, "r": 16}, num_iterations=2)
    with pytest.raises(SamplerError, match=r"refused POST /v1/load_lora_adapter(.|\n)*rank"):
        trainer.train()


# Its answers


def test_answers_stop_at_the_end_token_or_at_the_length_limit(lora_server, make_run, tokenizer):
    trainer = make_run(lora_server, num_iterations=1, max_completion_length=6)
    trainer.train()
    completions = all_completions(trainer.store, 0).to_pylist()
    for completion in completions:
        ends = completion["completion_ids"][-1] == tokenizer.eos_token_id
        assert ends == (completion["finish_reason"] == "stop")
        assert tokenizer.eos_token_id not in completion["completion_ids"][:-1]
        assert len(completion["completion_ids"]) == 6 or ends
    assert {completion["finish_reason"] for completion in completions} == {"stop", "length"}


def test_same_seed_repeats_the_answers(lora_server, tiny_model, connect):
    sampler = connect(lora_server.base_url, api_key=lora_server.api_key, model=tiny_model)
    sampler.select(0, None)
    params = SamplingParams(12, (2,))
    first, again = (by_key(sampler.sample(make_requests(100), params)) for _ in range(2))
    others = [CompletionRequest(one.key, one.prompt_ids, seed=one.seed + 1000) for one in make_requests(100)]
    assert first == again != by_key(sampler.sample(others, params))


# What is refused, before a model is loaded


LONG = Dataset.from_dict({"prompt": ["a" * 50], "completion": ["B"]})


@pytest.fixture
def no_model(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("the model was loaded before the server was checked")

    monkeypatch.setattr("trl.trainer.dpo_trainer.create_model_from_path", fail)


@pytest.mark.parametrize(
    ("kind", "lora", "given", "message"),
    [
        ("full", LORA, {}, r"cannot load the LoRA adapters.*--lora-rank 8"),
        ("lora", None, {}, r"cannot load the weights.*VLLM_SERVER_DEV_MODE"),
        ("full", None, {"vllm_server_model": "org/other"}, r"serves \['.*tiny'\], not 'org/other'"),
        ("full", None, {"train_dataset": LONG}, r"context of 48 tokens, but at least 52 are needed.*--max-model-len"),
    ],
    ids=["no LoRA", "no reloading", "another model", "too short for any prompt"],
)
def test_server_that_cannot_play_the_run_is_refused(kind, lora, given, message, request, make_run, no_model):
    with pytest.raises(SamplerError, match=message):
        make_run(request.getfixturevalue(f"{kind}_server"), lora, **given)


def test_prompt_too_long_for_the_server_is_dropped_before_generation(lora_server, train_dataset, make_run):
    """The server's context is 48 tokens, the model's 64."""
    dataset = Dataset.from_list([*LONG, *train_dataset.select(range(9))])
    assert len(make_run(lora_server, train_dataset=dataset).game.dataset) == 9
