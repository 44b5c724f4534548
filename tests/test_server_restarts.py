"""Real vLLM servers that are killed in the middle of the work, and come back without the opponent, or do not."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from spin_trl import SPINTrainer
from spin_trl.generation.sampler import Completion, CompletionRequest, SamplerError, SamplingParams
from spin_trl.generation.vllm import sampler as vllm_sampler
from spin_trl.generation.vllm.http_api import VLLMServer
from spin_trl.generation.vllm.managed_server import ManagedServer
from spin_trl.generation.vllm.sampler import VLLMSampler


NUM_REQUESTS = 600
KILLED_AT = 300  # number of requests that have been taken when the server is killed


def kill(server: ManagedServer) -> None:
    """End the process that answers, as the system does when memory runs out."""
    (vllm,) = psutil.Process(server._process.pid).children()
    vllm.kill()
    vllm.wait(60)


def make_requests() -> list[CompletionRequest]:
    generator = random.Random(0)
    prompts = [generator.choices(range(5, 30), k=generator.randint(3, 8)) for _ in range(NUM_REQUESTS)]
    return [CompletionRequest((row, 0), prompt, seed=row) for row, prompt in enumerate(prompts)]


def killing(server: ManagedServer, requests: list[CompletionRequest]) -> Iterator[CompletionRequest]:
    for number, request in enumerate(requests):
        if number == KILLED_AT:
            kill(server)
        yield request


def make_sampler(server: ManagedServer, tiny_model: str, lora_rank: int | None, eos_token_id: int) -> VLLMSampler:
    sampler = VLLMSampler(tiny_model, lora_rank)
    client = VLLMServer(server.base_url, server.api_key, max_concurrent_requests=16)
    sampler.connect(client, "spin-test", min_context_length=20)
    return sampler


def publish(sampler: VLLMSampler, iteration: int, checkpoint: Path | None) -> None:
    sampler.publish(iteration, checkpoint)
    sampler.select(iteration, checkpoint)


def by_key(completions: Iterator[Completion]) -> dict[tuple[int, int], list[int]]:
    answers = [(completion.key, completion.token_ids) for completion in completions]
    assert len(dict(answers)) == len(answers)  # none came twice
    return dict(answers)


@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_restarted_server_gets_the_opponent_again_and_no_answer_is_lost_doubled_or_anothers(
    kind, request, tiny_model, tokenizer, tmp_path, monkeypatch, record_property
):
    """Greedy answers are those of the undisturbed server, and not the base model's."""
    monkeypatch.setattr(vllm_sampler, "_NUM_BETWEEN_CONFIRMATIONS", 32)
    server = request.getfixturevalue(f"{kind}_server")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    else:
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "opponent")

    params = SamplingParams(12, (tokenizer.eos_token_id,), temperature=0.0)
    sampler = make_sampler(server, tiny_model, 8 if kind == "lora" else None, tokenizer.eos_token_id)
    try:
        publish(sampler, 0, None)
        base = by_key(sampler.sample(make_requests(), params))
        publish(sampler, 1, tmp_path / "opponent")
        expected = by_key(sampler.sample(make_requests(), params))
        assert len(expected) == NUM_REQUESTS
        assert sum(base[key] != expected[key] for key in expected) > 0.9 * NUM_REQUESTS

        num_restarts = server.num_restarts
        found = by_key(sampler.sample(killing(server, make_requests()), params))
        assert server.num_restarts == num_restarts + 1
        assert found == expected
        record_property("killed", f"the real vLLM server, {kind}")
        record_property("completions_lost", NUM_REQUESTS - len(found))
    finally:
        sampler.close()


@pytest.mark.slow
def test_run_goes_on_with_its_own_server_started_again_and_ends_at_once_when_that_dies_too_often(
    tiny_model, train_dataset, make_config, monkeypatch, caplog, record_property
):
    config = make_config(num_iterations=3, vllm_mode="managed", vllm_max_restarts=1, per_device_generation_batch_size=2)
    trainer = SPINTrainer(
        tiny_model, config, train_dataset=train_dataset, peft_config=LoraConfig(r=8, target_modules="all-linear")
    )
    setup, sample = trainer.plan, VLLMSampler.sample
    killed_at = []

    def sample_and_kill(self, requests, params, logprobs=False):
        def killing():
            for number, one in enumerate(requests):
                if number == 20 and trainer.run.iteration in (0, 1):  # of the iteration before
                    kill(setup.managed_server)
                    killed_at.append(time.monotonic())
                yield one

        return sample(self, killing(), params, logprobs)

    monkeypatch.setattr(VLLMSampler, "sample", sample_and_kill)
    with pytest.raises(
        SamplerError, match=r"`vllm_max_restarts` is 1(.|\n)*vllm-server\.log:\n(.|\n)*startup"
    ) as error:
        trainer.train()
    assert time.monotonic() - killed_at[1] < config.vllm_server_timeout / 2
    assert "ended with status 137" in str(error.value)  # as a shell says of a process that was killed
    # Iteration 1 was played in full, by its own opponent, although its server died; iteration 2 has no pairs.
    assert len(trainer.store.read_completions(1, "generations")) == 48
    record_property("killed", "the managed server of a run")
    record_property("completions_lost", 48 - len(trainer.store.read_completions(1, "generations")))
    assert trainer.store.has_pairs(1) and not trainer.store.has_pairs(2)
    assert "is started again (restart 1 of at most 1)" in caplog.text
    log = trainer.store.server_log.read_text()
    assert log.count("--enable-lora") == 1 and log.count("is started again (restart 1 of at most 1)") == 1
    assert trainer.plan.sampler_host.managed_server is None
