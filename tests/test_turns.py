"""When server and policy change turns in a run. The server pretends; that real ones follow is in `test_one_gpu.py`."""

import pytest
from fault_server import FakeVLLM

from spin_trl import SPINTrainer, self_play
from spin_trl.evaluation import held_out
from spin_trl.play.turns import Turns
from spin_trl.policy.offload import Offloader


class Server:
    """Stands in for a `ServerRest`, and writes down what becomes of it."""

    def __init__(self, events: list[str]):
        self.events = events
        self.is_awake = True

    def __str__(self) -> str:
        return "only pretends to sleep"

    def _rest(self, how: str) -> None:
        if self.is_awake:
            self.events.append(how)
        self.is_awake = False

    def nap(self) -> None:
        self._rest("nap")

    def sleep(self) -> None:
        self._rest("sleep")

    def wake(self) -> None:
        if not self.is_awake:
            self.events.append("wake")
        self.is_awake = True


class Run:
    """A trainer whose opponents a fake server plays, with everything that needs server or policy written down."""

    def __init__(self, trainer: SPINTrainer, faulty, monkeypatch, offloads: bool):
        self.trainer = trainer
        self.events: list[str] = []
        self.server = Server(self.events)
        self.vllm = FakeVLLM(name=trainer.plan.model_name, context_length=64)
        faulty.answer = self.answer
        trainer.game.turns = Turns(server_sleeps=True, offloader=trainer._offloader() if offloads else None)
        trainer.plan.server_rest = lambda sampler: self.server
        monkeypatch.setattr(self_play, "score_pairs", self.with_policy(self_play.score_pairs, "score"))
        for name in ("score_pairs", "negative_log_likelihood"):
            monkeypatch.setattr(held_out, name, self.with_policy(getattr(held_out, name), "evaluate"))
        trainer.policy.save = self.with_policy(trainer.policy.save, "save")
        trainer.training_step = self.with_policy(trainer.training_step, "step")

    def policy_is_here(self) -> bool:
        return all(parameter.numel() > 0 for parameter in self.trainer.model.parameters())

    def with_policy(self, function, name: str):
        def noted(*args, **kwargs):
            assert self.policy_is_here()
            self.note(name)
            return function(*args, **kwargs)

        return noted

    def answer(self, path: str, body: dict | None):
        if path == "/v1/completions":
            assert self.server.is_awake
            self.note("complete" if self.policy_is_here() else "complete without policy")
        return self.vllm(path, body)

    def note(self, event: str) -> None:
        if self.events[-1:] != [event]:
            self.events.append(event)


@pytest.fixture
def make_run(faulty, tiny_model, train_dataset, eval_dataset, make_config, monkeypatch):
    def make(offloads: bool, **settings) -> Run:
        faulty.answer = FakeVLLM(name=tiny_model)
        config = make_config(
            vllm_server_base_url=faulty.url, publish_check_tolerance=None, num_iterations=2, logging_steps=1, **settings
        )
        trainer = SPINTrainer(tiny_model, config, train_dataset=train_dataset, eval_dataset=eval_dataset)
        return Run(trainer, faulty, monkeypatch, offloads)

    return make


def test_policy_makes_way_for_the_server_and_the_server_for_the_policy(make_run):
    run = make_run(offloads=True)
    run.trainer.train()
    evaluation = ["wake", "complete without policy", "nap", "evaluate"]
    iteration = [*evaluation, "wake", "complete without policy", "sleep", "score", "step"]
    assert run.events == ["nap", *iteration, "save", *iteration, "save", *evaluation]
    assert run.policy_is_here()
    metrics = run.trainer.store.read_metrics(1)
    assert {"seconds_wake", "seconds_sleep", "seconds_offload", "seconds_reload"} <= metrics.keys()
    num_parameters = sum(parameter.numel() for parameter in run.trainer.model.parameters())
    assert metrics["gigabytes_freed_by_policy"] >= 3 * 4 * num_parameters / 1e9  # with Adam's two moments, in float32


def test_server_beside_which_the_policy_stays_rests_only_while_it_trains(make_run):
    run = make_run(offloads=False)
    run.trainer.train()
    iteration = ["complete", "evaluate", "complete", "sleep", "score", "step"]
    assert run.events == [*iteration, "save", "wake", *iteration, "save", "wake", "complete", "evaluate", "sleep"]


def test_run_that_is_continued_with_its_pairs_at_hand_lets_the_server_rest_at_once(make_run):
    first = make_run(offloads=True, save_strategy="epoch", resume="auto")
    begin_iteration = first.trainer.begin_iteration
    first.trainer.begin_iteration = lambda i, pairs: 1 / 0 if i == 1 else begin_iteration(i, pairs)
    with pytest.raises(ZeroDivisionError):
        first.trainer.train()
    assert first.trainer.store.has_pairs(1)
    second = make_run(offloads=True, save_strategy="epoch", resume="auto")
    second.server.nap = lambda: None  # as one that cannot sleep
    second.trainer.train()
    assert second.events[:3] == ["sleep", "step", "save"]
    assert "complete without policy" in second.events  # of the final evaluation


def test_policy_is_back_when_the_run_has_failed_in_the_servers_turn(make_run):
    run = make_run(offloads=True)
    run.trainer.sampler.sample = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run.trainer.train()
    assert run.policy_is_here()


def test_costs_are_of_the_time_since_they_were_last_asked_for():
    turns = Turns(offloader=Offloader(lambda: []))
    turns.give_to_server()
    assert turns.take_costs().keys() == {"seconds_offload"}
    assert turns.take_costs() == {}
