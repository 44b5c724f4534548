"""Server and policy take turns, in whole runs with a real vLLM server.

The CPU build of vLLM frees nothing when it sleeps, but it answers `/sleep` and `/wake_up`, and generates nothing in
between, as on a GPU. Memory itself is measured in `test_gpu.py`.
"""

import json
import urllib.request
from dataclasses import replace

import pytest
from peft import LoraConfig
from transformers import TrainerCallback

from spin_trl import SPINTrainer
from spin_trl.generation.vllm import managed_server
from spin_trl.generation.vllm.managed_server import ManagedServer


SLOW_STARTS = [pytest.mark.slow, pytest.mark.timeout(1800)]  # a server that is ended is started for every turn
TAKING_TURNS = {"vllm_sleep": True, "offload_policy_during_generation": True}


@pytest.fixture
def sleeping_in_earnest(monkeypatch):
    """Have the CPU build asked to sleep and to wake up, which it is not otherwise."""
    serve_command = managed_server.serve_command

    def command_of_one_that_sleeps(**options):
        command = serve_command(**options)
        return replace(command, can_sleep=True, env={**command.env, "VLLM_SERVER_DEV_MODE": "1"})

    monkeypatch.setattr(managed_server, "serve_command", command_of_one_that_sleeps)


class Observer(TrainerCallback):
    """Sees at every step who has given way, and at every request."""

    def __init__(self, trainer: SPINTrainer):
        self.trainer = trainer
        self.rests_at_steps: list[str] = []
        self.sampled_without_policy: list[bool] = []
        self.losses: list[float] = []
        sample = trainer.sampler.sample

        def observed(*args, **kwargs):
            self.sampled_without_policy.append(all(p.numel() == 0 for p in trainer.model.parameters()))
            return sample(*args, **kwargs)

        trainer.sampler.sample = observed
        trainer.add_callback(self)

    def on_step_begin(self, args, state, control, **kwargs):
        if self.trainer.self_play_setup.managed_server is not None:
            self.rests_at_steps.append(how_it_rests(self.trainer.self_play_setup.managed_server))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


def how_it_rests(server: ManagedServer) -> str:
    if server._process is None:
        return "ended"
    with urllib.request.urlopen(f"{server.base_url}/is_sleeping", timeout=10) as response:
        return "asleep" if json.load(response)["is_sleeping"] else "awake"


def play(kind: str, folder, tiny_model, train_dataset, eval_dataset, make_config, **settings) -> Observer:
    config = make_config(
        output_dir=str(folder),
        vllm_max_concurrent_requests=1,  # what is computed together varies otherwise, and with it the last digits
        **settings,
    )
    trainer = SPINTrainer(
        tiny_model,
        config,
        train_dataset=train_dataset.select(range(16)),
        eval_dataset=eval_dataset.select(range(4)),
        peft_config=LoraConfig(r=8, target_modules="all-linear") if kind == "lora" else None,
    )
    observer = Observer(trainer)
    trainer.train()
    return observer


@pytest.mark.parametrize(
    ("kind", "way", "num_iterations"),
    [
        ("full", "asleep", 2),
        pytest.param("lora", "asleep", 3, marks=pytest.mark.slow),
        pytest.param("full", "ended", 2, marks=SLOW_STARTS),
        pytest.param("lora", "ended", 2, marks=SLOW_STARTS),
    ],
)
def test_taking_turns_changes_no_pair_and_no_loss(
    kind, way, num_iterations, request, tiny_model, train_dataset, eval_dataset, make_config, tmp_path
):
    parts = (tiny_model, train_dataset, eval_dataset, make_config)
    server = request.getfixturevalue(f"{kind}_server")
    length = {"num_iterations": num_iterations}
    address = {"vllm_server_base_url": server.base_url, "vllm_api_key": server.api_key}
    together = play(kind, tmp_path / "together", *parts, **length, **address)
    if way == "asleep":
        request.getfixturevalue("sleeping_in_earnest")
    in_turn = play(kind, tmp_path / "in-turn", *parts, vllm_mode="managed", **length, **TAKING_TURNS)

    num_steps = sum([2, 4, 4][:num_iterations])
    assert in_turn.rests_at_steps == [way] * num_steps
    assert all(in_turn.sampled_without_policy) and not any(together.sampled_without_policy)
    assert in_turn.losses == together.losses and len(in_turn.losses) == num_steps
    for iteration in range(num_iterations):
        pairs, expected = (o.trainer.store.read_pairs(iteration) for o in (in_turn, together))
        assert pairs[:] == expected[:]
        metrics = in_turn.trainer.store.read_metrics(iteration)
        assert metrics["publish_check_difference"] < 1e-4
        assert metrics["gigabytes_freed_by_policy"] > 0
        assert {f"seconds_{what}" for what in ("offload", "reload", "sleep")} <= metrics.keys()
    evaluations = [o.trainer.store.read_metrics(num_iterations)["evaluation"] for o in (in_turn, together)]
    assert evaluations[0] == evaluations[1]
    assert all(parameter.numel() > 0 for parameter in in_turn.trainer.model.parameters())
