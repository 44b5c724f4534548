"""Self-play against a real vLLM server that somebody else runs (`vllm_server_base_url`)."""

import json
import os
import subprocess
import sys
import textwrap

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
def make_run(tiny_model, train_dataset, make_config):
    """A factory of trainers against a server, with an adapter or, with `lora=None`, with full weights."""

    def make(server: RealServer, lora: dict | None = LORA, dataset: Dataset = train_dataset, **settings) -> SPINTrainer:
        config = make_config(**{**server.fields, **settings})
        peft_config = None if lora is None else LoraConfig(**lora)
        return SPINTrainer(tiny_model, config, train_dataset=dataset, peft_config=peft_config)

    return make


# The opponent


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_every_iterations_opponent_is_another_and_the_server_plays_it(kind, request, make_run):
    server = request.getfixturevalue(f"{kind}_server")
    trainer = make_run(server, LORA if kind == "lora" else None, learning_rate=1e-2)
    trainer.train()
    for iteration in range(3):
        assert trainer.store.read_metrics(iteration)["publish_check_difference"] < 1e-4
        assert trainer.store.read_pairs(iteration)["row"][:48] == list(range(48))
    assert not trainer.store.path(0, "opponent").exists()  # it is the base model
    folders = [trainer.store.path(iteration, "opponent") for iteration in (1, 2)]
    first, second = (load_file(next(folder.glob("*.safetensors"))) for folder in folders)
    assert any((first[name] - second[name]).abs().max() > 1e-3 for name in first)
    assert {path.suffix for folder in folders for path in folder.iterdir()} <= {
        ".json",
        ".safetensors",
        ".jinja",
        ".md",
    }
    assert "vllm" not in sys.modules


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
    trainer = make_run(lora_server, dataset=dataset, num_iterations=1, max_length=20)
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


# A script


def test_user_script_plays_three_iterations(lora_server, tiny_model, train_dataset, tmp_path):
    """As a user writes it, against a server that runs already."""
    train_dataset.to_json(tmp_path / "sft.jsonl")
    script = f"""
    from peft import LoraConfig
    from datasets import load_dataset
    from spin_trl import SPINConfig, SPINTrainer

    trainer = SPINTrainer(
        model={tiny_model!r},
        args=SPINConfig(output_dir="out", num_iterations=3, beta=0.1, learning_rate=5e-7,
                        vllm_server_base_url={lora_server.base_url!r}, temperature=0.7, max_completion_length=1024,
                        use_cpu=True, bf16=False, report_to="none"),
        train_dataset=load_dataset("json", data_files="sft.jsonl", split="train"),   # prompt + completion
        peft_config=LoraConfig(r=8, target_modules="all-linear"),
    )
    trainer.train()
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = [json.loads((tmp_path / f"out/iteration-{i}/metrics.json").read_text()) for i in range(3)]
    assert [m["num_pairs"] for m in metrics] == [48, 48, 48]
    # With history, and without the few pairs in which the opponent repeated the ground truth.
    assert [m["num_training_pairs"] > 40 * n for m, n in zip(metrics, (1, 2, 2), strict=True)] == [True] * 3
    assert list((tmp_path / "out").glob("checkpoint-*/adapter_model.safetensors"))
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not [path for path in files if lora_server.api_key.encode() in path.read_bytes()]


# What is refused, before a model is loaded


@pytest.fixture
def no_model(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("the model was loaded before the server was checked")

    monkeypatch.setattr("trl.trainer.dpo_trainer.create_model_from_path", fail)


@pytest.mark.parametrize(
    ("kind", "lora", "settings", "message"),
    [
        (
            "full",
            None,
            {"vllm_server_base_url": "http://127.0.0.1:9", "vllm_server_timeout": 1.0},
            r":9 did not answer",
        ),
        ("full", LORA, {}, r"cannot load the LoRA adapters.*--lora-rank 8"),
        ("lora", None, {}, r"cannot load the weights.*VLLM_SERVER_DEV_MODE"),
        (
            "full",
            None,
            {"vllm_server_model": "org/other"},
            r"serves \['.*tiny'\], not 'org/other'.*`vllm_server_model`",
        ),
    ],
    ids=["absent", "no LoRA", "no reloading", "another model"],
)
def test_server_that_cannot_play_the_run_is_refused(kind, lora, settings, message, request, make_run, no_model):
    with pytest.raises(SamplerError, match=message):
        make_run(request.getfixturevalue(f"{kind}_server"), lora, **settings)


def test_prompt_too_long_for_the_server_is_dropped_before_generation(lora_server, train_dataset, make_run):
    """The server's context is 48 tokens, the model's 64."""
    dataset = Dataset.from_list([*train_dataset, {"prompt": "a" * 50, "completion": "B"}])
    trainer = make_run(lora_server, dataset=dataset, num_iterations=1)
    assert len(trainer.game.dataset) == 48


def test_context_too_short_for_any_prompt_is_refused(full_server, make_run, no_model):
    dataset = Dataset.from_dict({"prompt": ["a" * 50], "completion": ["B"]})
    with pytest.raises(SamplerError, match=r"context of 48 tokens, but at least 52 are needed.*--max-model-len"):
        make_run(full_server, lora=None, dataset=dataset)
