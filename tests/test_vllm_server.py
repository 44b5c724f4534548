"""Self-play against a real vLLM server that somebody else runs (`vllm_mode: server`)."""

import json
import subprocess
import sys
import textwrap
import urllib.request

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from spin_trl import SPINTrainer
from spin_trl.generation.sampler import CompletionRequest, SamplerError, SamplingParams
from spin_trl.generation.vllm.http_api import VLLMServer
from spin_trl.generation.vllm.sampler import VLLMSampler


LORA = {"r": 8, "target_modules": "all-linear"}


def server_fields(server) -> dict:
    return {"vllm_server_base_url": server.base_url, "vllm_api_key": server.api_key}


def policy_logps(model, prompt_ids: list[int], completion_ids: list[int]) -> list[float]:
    ids = prompt_ids + completion_ids
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [logps[i - 1, ids[i]].item() for i in range(len(prompt_ids), len(ids))]


def server_logps(server, model: str, prompt_ids: list[int], completion_ids: list[int]) -> list[float]:
    """Log-probs that the server gives for a completion of ours, one prompt at a time."""
    body = {"model": model, "prompt": prompt_ids + completion_ids, "max_tokens": 1, "prompt_logprobs": 0}
    request = urllib.request.Request(
        f"{server.base_url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {server.api_key}"},
    )
    with urllib.request.urlopen(request) as response:
        positions = json.load(response)["choices"][0]["prompt_logprobs"][len(prompt_ids) :]
    return [next(iter(position.values()))["logprob"] for position in positions]


def spy_on_the_server(monkeypatch, server, row: dict) -> list[list[float]]:
    """Ask the server for the log-probs of one fixed sequence under each opponent, as soon as it is published."""
    seen = []
    select = VLLMSampler.select

    def select_and_ask(self, iteration, checkpoint):
        select(self, iteration, checkpoint)
        seen.append(server_logps(server, self._names[iteration], row["prompt_ids"], row["chosen_ids"]))

    monkeypatch.setattr(VLLMSampler, "select", select_and_ask)
    return seen


def assert_opponents_differ(seen: list[list[float]]) -> None:
    for older, newer in zip(seen, seen[1:], strict=False):
        assert max(abs(a - b) for a, b in zip(older, newer, strict=True)) > 1e-3


def test_lora_plays_a_different_opponent_in_each_of_three_iterations(
    lora_server, tiny_model, train_dataset, make_config, monkeypatch
):
    config = make_config(**server_fields(lora_server))
    trainer = SPINTrainer(tiny_model, config, train_dataset=train_dataset, peft_config=LoraConfig(**LORA))
    row = trainer.game.dataset[0]
    seen = spy_on_the_server(monkeypatch, lora_server, row)
    trainer.train()

    assert len(seen) == 3
    assert_opponents_differ(seen)
    for iteration in range(3):
        assert trainer.store.read_metrics(iteration)["publish_check_difference"] < 1e-4
        assert trainer.store.read_pairs(iteration)["row"][:48] == list(range(48))
    # Each opponent lies on disk as it was played.
    for iteration in (1, 2):
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        opponent = PeftModel.from_pretrained(base, str(trainer.store.path(iteration, "opponent")))
        assert policy_logps(opponent, row["prompt_ids"], row["chosen_ids"]) == pytest.approx(seen[iteration], abs=1e-4)
    assert not trainer.store.path(0, "opponent").exists()
    assert "vllm" not in sys.modules


def test_full_weights_play_a_different_opponent_in_each_of_two_iterations(
    full_server, tiny_model, train_dataset, make_config, monkeypatch
):
    config = make_config(num_iterations=2, **server_fields(full_server))
    trainer = SPINTrainer(tiny_model, config, train_dataset=train_dataset)
    row = trainer.game.dataset[0]
    seen = spy_on_the_server(monkeypatch, full_server, row)
    trainer.train()

    assert len(seen) == 2
    assert_opponents_differ(seen)
    for iteration, folder in enumerate([tiny_model, str(trainer.store.path(1, "opponent"))]):
        assert trainer.store.read_metrics(iteration)["publish_check_difference"] < 1e-4
        opponent = AutoModelForCausalLM.from_pretrained(folder)
        assert policy_logps(opponent, row["prompt_ids"], row["chosen_ids"]) == pytest.approx(seen[iteration], abs=1e-4)
    assert {path.suffix for path in trainer.store.path(1, "opponent").iterdir()} <= {".json", ".safetensors", ".jinja"}


def test_server_is_brought_back_to_the_base_model_by_the_next_run(
    full_server, tiny_model, train_dataset, make_config, tmp_path
):
    """A run leaves its last opponent on the server. The next one must not start against it."""
    for name in ("first", "second"):
        config = make_config(num_iterations=2, output_dir=str(tmp_path / name), **server_fields(full_server))
        SPINTrainer(tiny_model, config, train_dataset=train_dataset).train()


def test_publish_check_catches_a_server_left_on_an_old_opponent(
    full_server, tiny_model, train_dataset, make_config, monkeypatch
):
    """The server says it reloaded, and did not."""
    reload_weights = VLLMServer.reload_weights
    monkeypatch.setattr(
        VLLMServer, "reload_weights", lambda self, path: None if "opponent" in path else reload_weights(self, path)
    )
    config = make_config(learning_rate=1e-2, **server_fields(full_server))
    trainer = SPINTrainer(tiny_model, config, train_dataset=train_dataset)
    with pytest.raises(
        SamplerError, match=r"does not play iteration 1's opponent: over \d+ tokens of 8 .* completions"
    ):
        trainer.train()


def test_server_answers_stop_at_the_end_token_or_at_the_length_limit(
    lora_server, tiny_model, train_dataset, make_config, tokenizer
):
    config = make_config(num_iterations=1, max_completion_length=6, **server_fields(lora_server))
    trainer = SPINTrainer(tiny_model, config, train_dataset=train_dataset, peft_config=LoraConfig(**LORA))
    trainer.train()
    completions = trainer.store.read_completions(0, "generations").to_pylist()
    for completion in completions:
        ends = completion["completion_ids"][-1] == tokenizer.eos_token_id
        assert ends == (completion["finish_reason"] == "stop")
        assert tokenizer.eos_token_id not in completion["completion_ids"][:-1]
        assert len(completion["completion_ids"]) == 6 or ends
    assert {completion["finish_reason"] for completion in completions} == {"stop", "length"}


def test_same_seed_repeats_the_servers_answers(lora_server, tiny_model, train_dataset, make_config, tmp_path):
    answers = []
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        config = make_config(num_iterations=1, seed=seed, output_dir=str(tmp_path / name), **server_fields(lora_server))
        trainer = SPINTrainer(tiny_model, config, train_dataset=train_dataset, peft_config=LoraConfig(**LORA))
        trainer.train()
        answers.append(trainer.store.read_completions(0, "generations")["completion_ids"].to_pylist())
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]


def test_prompt_too_long_for_the_server_is_dropped_before_generation(
    lora_server, tiny_model, train_dataset, make_config
):
    """The server's context is 48 tokens, the model's 64."""
    dataset = Dataset.from_list([*train_dataset, {"prompt": "a" * 50, "completion": "B"}])
    config = make_config(num_iterations=1, **server_fields(lora_server))
    trainer = SPINTrainer(tiny_model, config, train_dataset=dataset, peft_config=LoraConfig(**LORA))
    assert len(trainer.game.dataset) == 48
    assert trainer.plan.data.num_dropped == 1


def test_user_script_plays_three_iterations(lora_server, tiny_model, train_dataset, tmp_path):
    """The README's script, with a tiny local model and a CPU's settings in place of the 7B one."""
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
    import os

    env = {**os.environ, "VLLM_API_KEY": lora_server.api_key, "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = [json.loads((tmp_path / f"out/iteration-{i}/metrics.json").read_text()) for i in range(3)]
    assert [m["num_pairs"] for m in metrics] == [48, 48, 48]
    # With history, and without the few pairs in which the opponent repeated the ground truth.
    assert [m["num_training_pairs"] > 40 * n for m, n in zip(metrics, (1, 2, 2), strict=True)] == [True] * 3
    assert list((tmp_path / "out").glob("checkpoint-*/adapter_model.safetensors"))
    assert not [
        path
        for path in (tmp_path / "out").rglob("*")
        if path.is_file() and lora_server.api_key.encode() in path.read_bytes()
    ]


class TestRefusedBeforeTheModelIsLoaded:
    @pytest.fixture(autouse=True)
    def no_model(self, monkeypatch):
        def fail(*args, **kwargs):
            raise AssertionError("the model was loaded before the server was checked")

        monkeypatch.setattr("trl.trainer.dpo_trainer.create_model_from_path", fail)

    def test_no_server_within_the_timeout(self, tiny_model, train_dataset, make_config):
        config = make_config(vllm_server_base_url="http://127.0.0.1:9", vllm_server_timeout=1.0)
        with pytest.raises(SamplerError, match=r"http://127.0.0.1:9 did not answer .* `vllm_server_timeout` \(1 s\)"):
            SPINTrainer(tiny_model, config, train_dataset=train_dataset)

    def test_server_without_lora(self, full_server, tiny_model, train_dataset, make_config):
        config = make_config(**server_fields(full_server))
        with pytest.raises(SamplerError, match=r"cannot load the LoRA adapters.*--lora-rank 8"):
            SPINTrainer(tiny_model, config, train_dataset=train_dataset, peft_config=LoraConfig(**LORA))

    def test_server_that_cannot_reload_weights(self, lora_server, tiny_model, train_dataset, make_config):
        config = make_config(**server_fields(lora_server))
        with pytest.raises(SamplerError, match=r"cannot load the weights.*VLLM_SERVER_DEV_MODE"):
            SPINTrainer(tiny_model, config, train_dataset=train_dataset)

    def test_server_of_another_model(self, full_server, tiny_model, train_dataset, make_config, tmp_path):
        import shutil

        other = tmp_path / "other-model"
        shutil.copytree(tiny_model, other)
        with pytest.raises(SamplerError, match=r"serves \['.*tiny'\], not '.*other-model'.*`vllm_server_model`"):
            SPINTrainer(str(other), make_config(**server_fields(full_server)), train_dataset=train_dataset)

    def test_context_too_short_for_any_prompt(self, full_server, tiny_model, make_config):
        dataset = Dataset.from_dict({"prompt": ["a" * 50], "completion": ["B"]})
        with pytest.raises(SamplerError, match=r"context of 48 tokens, but at least 52 are needed.*--max-model-len"):
            SPINTrainer(tiny_model, make_config(**server_fields(full_server)), train_dataset=dataset)

    def test_wrong_api_key(self, full_server, tiny_model, train_dataset, make_config):
        config = make_config(vllm_server_base_url=full_server.base_url, vllm_api_key="wrong")
        with pytest.raises(SamplerError, match="HTTP 401"):
            SPINTrainer(tiny_model, config, train_dataset=train_dataset)


def test_publish_check_works_where_answers_would_be_truncated(lora_server, tiny_model, make_config):
    """Prompts of 17 tokens and a `max_length` of 20 leave 3 tokens of each answer to be scored."""
    dataset = Dataset.from_dict({"prompt": ["a" * 16, "b" * 16], "completion": ["AA B K", "B AA T"]})
    config = make_config(num_iterations=1, max_length=20, **server_fields(lora_server))
    trainer = SPINTrainer(tiny_model, config, train_dataset=dataset, peft_config=LoraConfig(**LORA))
    trainer.train()
    assert trainer.store.read_metrics(0)["publish_check_difference"] < 1e-4


def test_adapter_of_too_high_a_rank_is_refused_with_the_servers_words(
    lora_server, tiny_model, train_dataset, make_config
):
    """The server takes rank 8."""
    config = make_config(num_iterations=2, **server_fields(lora_server))
    lora = LoraConfig(r=16, target_modules="all-linear")
    trainer = SPINTrainer(tiny_model, config, train_dataset=train_dataset, peft_config=lora)
    with pytest.raises(SamplerError, match=r"refused POST /v1/load_lora_adapter(.|\n)*rank"):
        trainer.train()


def test_prompts_that_fill_more_than_one_step_of_the_engine_are_all_answered(full_server, tiny_model):
    """Some would be read in two steps, if that were not forbidden; with a seed this ends the engine on a CPU."""
    sampler = VLLMSampler(tiny_model, None)
    sampler.connect(VLLMServer(full_server.base_url, full_server.api_key), "filling", min_context_length=2)
    try:
        sampler.publish(0, None)
        sampler.select(0, None)
        requests = [CompletionRequest((row, 0), [5 + row % 20] * (30 + row % 10), seed=row) for row in range(512)]
        answers = list(sampler.sample(requests, SamplingParams(4, (2,))))
        assert sorted(answer.key[0] for answer in answers) == list(range(512))
    finally:
        sampler.close()
