"""Server and policy take turns, in whole runs with a real vLLM server.

The CPU build of vLLM cannot sleep: it is ended for the policy's turn and started for its own. That it sleeps, and what
memory is freed, is seen in `test_gpu.py`; who has which turn in `test_turns.py`.
"""

import pytest
from managed import listens
from peft import LoraConfig
from transformers import TrainerCallback

from spin_trl import SPINTrainer


class Observer(TrainerCallback):
    """Sees at every step whether the server is there, and whether the policy is."""

    def __init__(self, trainer: SPINTrainer):
        self.trainer = trainer
        self.server_answers: list[bool] = []
        self.losses: list[float] = []
        trainer.add_callback(self)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        assert all(parameter.numel() > 0 for parameter in model.parameters())
        self.server_answers.append(listens(self.trainer.sampler.replicas[0].address))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


@pytest.fixture
def play(tiny_model, train_dataset, eval_dataset, make_config, tmp_path):
    def make(name: str, kind: str, **settings) -> Observer:
        # What is computed together varies otherwise, and with it the last digits.
        fixed = {"output_dir": str(tmp_path / name), "num_iterations": 2}
        trainer = SPINTrainer(
            tiny_model,
            make_config(**fixed, **settings),
            train_dataset=train_dataset.select(range(16)),
            eval_dataset=eval_dataset.select(range(4)),
            peft_config=LoraConfig(r=8, target_modules="all-linear") if kind == "lora" else None,
        )
        observer = Observer(trainer)
        trainer.train()
        return observer

    return make


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the server is started for every turn
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_taking_turns_changes_no_pair_and_no_loss(kind, play, request):
    server = request.getfixturevalue(f"{kind}_server")
    together = play("together", kind, vllm_server_base_url=server.base_url)
    turns = {"vllm_sleep": True, "offload_policy_during_generation": True}
    in_turn = play("in-turn", kind, use_vllm=True, **turns)

    assert together.server_answers == [True] * 6 and in_turn.server_answers == [False] * 6
    assert in_turn.losses == together.losses and len(in_turn.losses) == 6
    for iteration in range(2):
        pairs, expected = (o.trainer.store.read_pairs(iteration) for o in (in_turn, together))
        assert pairs[:] == expected[:]
        metrics = in_turn.trainer.store.read_metrics(iteration)
        assert metrics["publish_check_difference"] < 1e-4 and metrics["gigabytes_freed_by_policy"] > 0
        assert {f"seconds_{what}" for what in ("offload", "reload", "sleep", "wake")} <= metrics.keys()
    evaluations = [o.trainer.store.read_metrics(2)["evaluation"] for o in (in_turn, together)]
    assert evaluations[0] == evaluations[1]
    assert all(parameter.numel() > 0 for parameter in in_turn.trainer.model.parameters())
