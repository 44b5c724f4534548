"""Real vLLM servers that are killed in the middle of the work, and come back without the opponent, or do not."""

import threading
from collections.abc import Iterator

import pytest
from conftest import all_completions
from managed import Servers
from peft import LoraConfig
from real_server import by_key, make_opponent, make_requests

from spin_trl.generation.sampler import CompletionRequest, SamplingParams


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_server_killed_in_mid_work_gets_the_opponent_again_and_no_answer_is_lost_doubled_or_anothers(
    kind, request, tiny_model, tokenizer, connect, tmp_path, record_property
):
    """Greedy answers are those of the undisturbed server, and not the base model's."""
    server = request.getfixturevalue(f"{kind}_server")
    options = {"lora_rank": 8 if kind == "lora" else None, "server_timeout": 300, "max_concurrent_requests": 16}
    sampler = connect(server.base_url, api_key=server.api_key, model=tiny_model, **options)
    params = SamplingParams(12, (tokenizer.eos_token_id,), temperature=0.0)
    answers = []
    for iteration, checkpoint in enumerate((None, make_opponent(tiny_model, tmp_path / "opponent", kind))):
        sampler.publish(iteration, checkpoint)
        sampler.select(iteration, checkpoint)
        answers.append(by_key(sampler.sample(make_requests(600), params)))
    base, expected = answers
    assert len(expected) == 600
    assert sum(base[key] != expected[key] for key in expected) > 500

    def killing() -> Iterator[CompletionRequest]:
        for number, one in enumerate(make_requests(600)):
            if number == 300:
                server.kill()
                threading.Thread(target=server.start).start()
            yield one

    found = by_key(sampler.sample(killing(), params))
    record_property("killed", f"the real vLLM server, {kind}")
    record_property("completions_lost", 600 - len(found))
    assert found == expected


def test_run_starts_its_own_server_again_if_it_is_killed_and_stops_it_when_it_fails(
    build_trainer, eval_dataset, monkeypatch, caplog, record_property
):
    servers = Servers()
    monkeypatch.setenv(servers.VARIABLE, servers.name)

    def metrics(prompts, references, generations):
        if trainer.store.has_pairs(0):
            raise ZeroDivisionError("in the user's metrics")
        servers.kill()
        return {}

    data = {"eval_dataset": eval_dataset, "compute_generation_metrics": metrics}
    lora = LoraConfig(r=8, target_modules="all-linear")
    trainer = build_trainer(peft_config=lora, use_vllm=True, num_iterations=2, **data)
    with pytest.raises(ZeroDivisionError, match="in the user's metrics"):
        trainer.train()
    assert servers.running() == []
    assert "is started again (restart 1 of at most 3)" in caplog.text
    num_completions = len(all_completions(trainer.store, 0))
    record_property("killed", "the managed server of a run")
    record_property("completions_lost", 48 - num_completions)
    assert num_completions == 48
    assert trainer.store.read_run()["sampler"]["mode"] == "managed"
    assert trainer.store.read_metrics(1)["publish_check_difference"] < 1e-4
    command = trainer.store.server_log.read_text().splitlines()[0]
    assert "--enable-lora" in command and "--uds" in command and "--port" not in command
