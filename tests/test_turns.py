"""When server and policy change turns. That a real server follows is seen in `test_one_gpu.py`."""

import pytest
import torch
from transformers import TrainerCallback

from spin_trl import SPINTrainer
from spin_trl.generation.sampler import Completion, OpponentSampler
from spin_trl.play.turns import Turns
from spin_trl.policy.offload import Offloader


class WatchesThePolicy(OpponentSampler, TrainerCallback):
    """Answers every prompt alike, and writes down in whose turn it does, and in whose turn the policy learns."""

    def __init__(self, fails: bool = False):
        self.fails = fails
        self.events: list[str] = []
        self.model = None

    def publish(self, iteration, checkpoint, earlier=None): ...

    def sample(self, requests, params, logprobs=False):
        self.note("answers")
        if self.fails:
            raise ZeroDivisionError
        for request in requests:
            yield Completion(request.key, [5, params.end_token_ids[0]], "stop")

    def on_step_begin(self, args, state, control, **kwargs):
        self.note("learns")

    def note(self, event: str) -> None:
        self.events.append(event if is_here(self.model) else f"{event} without policy")


def is_here(model) -> bool:
    return all(parameter.numel() > 0 for parameter in model.parameters())


@pytest.fixture
def make_trainer(build_trainer, eval_dataset):
    def make(sampler: WatchesThePolicy) -> SPINTrainer:
        settings = {"offload_policy_during_generation": True, "publish_check_tolerance": None, "use_vllm": None}
        settings |= {"num_iterations": 2, "per_device_train_batch_size": 48}
        trainer = build_trainer(eval_dataset=eval_dataset, sampler=sampler, callbacks=[sampler], **settings)
        sampler.model = trainer.model
        return trainer

    return make


def test_policy_is_away_while_a_sampler_answers_and_back_to_learn(make_trainer):
    trainer = make_trainer(sampler := WatchesThePolicy())
    trainer.train()
    answers = ["answers without policy"] * 2  # evaluation and training data
    assert sampler.events == [*answers, "learns", *answers, "learns", "learns", answers[0]]
    assert is_here(trainer.model)
    metrics = trainer.store.read_metrics(1)
    assert {"seconds_offload", "seconds_reload"} <= metrics.keys()
    num_parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert metrics["gigabytes_freed_by_policy"] >= 3 * 4 * num_parameters / 1e9  # with Adam's two moments, in float32


def test_policy_is_back_when_the_run_has_failed_in_the_servers_turn(make_trainer):
    trainer = make_trainer(WatchesThePolicy(fails=True))
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert trainer.sampler.events == ["answers without policy"] and is_here(trainer.model)


class Server:
    """Stands in for a `ServerRest`, and writes down what becomes of it."""

    def __init__(self):
        self.events: list[str] = []
        for event in ("nap", "sleep", "wake"):
            setattr(self, event, lambda event=event: self.events.append(event))


@pytest.mark.parametrize("offloads", [True, False])
def test_server_makes_way_briefly_only_where_the_policy_had_to(offloads):
    weight, server = torch.ones(2), Server()
    turns = Turns(server_sleeps=True, offloader=Offloader(lambda: [weight]) if offloads else None)
    turns.begin(server)
    turns.give_to_policy(briefly=True)
    assert server.events == (["nap"] if offloads else [])
    turns.give_to_server()
    assert len(weight) == (0 if offloads else 2)
    turns.give_to_policy()
    assert server.events[-1] == "sleep" and weight.tolist() == [1, 1]
    assert {"seconds_sleep", "seconds_wake"} <= turns.take_costs().keys()
    turns.give_to_server()
    assert server.events[-1] == "wake" and "seconds_sleep" not in turns.take_costs()
    turns.end()
    assert weight.tolist() == [1, 1]
