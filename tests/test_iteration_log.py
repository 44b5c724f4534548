"""What a run logs: every number is documented, logged once however often a run is stopped, and kept in `log.jsonl`.

Trackers are all given the same by transformers; it is read back from TensorBoard's own files.
"""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from conftest import ROOT, trained
from peft import LoraConfig
from stopping import AtStep, fail, train_until_stopped
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from spin_trl import SPINTrainer
from spin_trl.evaluation.metric_names import ITERATION, logged_values
from spin_trl.report.run_data import read_run


def own_entries(trainer: SPINTrainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if ITERATION in entry]


def loss_steps(entries: list[dict]) -> list[int]:
    return [entry["step"] for entry in entries if "loss" in entry]


def test_what_is_logged_and_what_is_documented_are_the_same(lora_server, play_run, eval_dataset):
    settings = {"num_iterations": 2, "vllm_server_base_url": lora_server.base_url}
    trainer = play_run(eval_dataset=eval_dataset, peft_config=LoraConfig(r=4), **settings)
    logged = {name for entry in own_entries(trainer) for name in entry} - {"epoch", "step"}
    _, table, _ = (ROOT / "docs" / "metrics.md").read_text().split("| metric |")  # the other one is of rewards
    assert logged == set(re.findall(r"^\| `(.*?)`", table, re.MULTILINE))
    others = {name for entry in trainer.state.log_history if ITERATION not in entry for name in entry}
    assert not any(name.startswith(("self_play/", "eval_")) for name in others)


def test_every_iteration_has_every_number_and_history_is_not_counted_as_its_own(play_run):
    trainer = play_run(num_iterations=2)
    first, second = (trainer.store.read_metrics(iteration) for iteration in (0, 1))
    assert set(first) == set(second) - {"collapse_signs"}  # the tiny model may show one
    assert (second["num_pairs"], second["num_training_pairs"]) == (48, 96)
    own = [row for row in trainer.store.read_pairs(1) if row["iteration"] == 1]
    logps, tokens = sum(row["ref_chosen_logps"] for row in own), sum(len(row["chosen_ids"]) for row in own)
    assert second["opponent_nll"] == pytest.approx(-logps / tokens)
    assert second["opponent_nll"] != first["opponent_nll"]  # another opponent
    assert min(second[name] for name in ("seconds_train", "tokens_per_second", "completions_per_second")) > 0


@pytest.fixture
def start(build_trainer, eval_dataset):
    """Six steps in iteration 0 and twelve in iteration 1, a checkpoint every two."""
    settings = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 2, "resume": "auto", "temperature": 0}
    settings["report_to"] = ["tensorboard"]
    return lambda *callbacks: build_trainer(eval_dataset=eval_dataset, callbacks=list(callbacks), **settings)


class AtNumber(TrainerCallback):
    """Stops the run as soon as it logs a number of that name for that iteration."""

    def __init__(self, iteration: int, name: str):
        self.iteration, self.name = iteration, name

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.name in logs and logs.get(ITERATION) == self.iteration:
            fail()


STOPS = [
    AtNumber(0, "eval_nll"),
    AtNumber(0, "self_play/num_pairs"),
    AtStep(3),
    AtNumber(0, "self_play/seconds_train"),
    AtNumber(1, "eval_nll"),
    AtStep(9),
    AtNumber(2, "eval_nll"),
]


def scalars_of(events: Path) -> list[tuple[tuple[str, int], float]]:
    """Name, step and value of all that a start has written for TensorBoard."""
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    return [((name, e.step), e.value) for name in accumulator.Tags()["scalars"] for e in accumulator.Scalars(name)]


def test_numbers_of_a_run_that_is_stopped_everywhere_are_logged_once(start):
    for stop in STOPS:
        stopped = train_until_stopped(start(stop))
        stopped.pop_callback(TensorBoardCallback).tb_writer.close()
    trainer = trained(start())
    entries = own_entries(trainer)
    counts = Counter((entry[ITERATION], name) for entry in entries for name in entry)
    assert {name for (_, name), count in counts.items() if count > 1} <= {ITERATION, "epoch", "step"}
    for iteration in range(3):
        logged = {}
        for entry in entries:
            if entry[ITERATION] == iteration:
                logged |= entry
        expected = logged_values(trainer.store.read_metrics(iteration))
        assert {name: logged.get(name) for name in expected} == expected
    assert loss_steps(trainer.state.log_history) == list(range(1, 19))

    tracked = defaultdict(set)
    for events in trainer.store.output_dir.rglob("events.*"):
        scalars = scalars_of(events)
        counts = Counter(key for key, _ in scalars if key[0] not in ("train/epoch", f"train/{ITERATION}"))
        assert max(counts.values()) == 1  # in every start
        for key, value in scalars:
            tracked[key].add(value)
    steps = {"train/self_play/rejected_length": [0, 6], "eval/nll": [0, 6, 18], "train/loss": list(range(1, 19))}
    assert {name: sorted(step for found, step in tracked if found == name) for name in steps} == steps
    assert all(len(values) == 1 for (name, _), values in tracked.items() if name.startswith("eval/"))


def test_log_is_on_disk_as_it_is_made_and_goes_on_behind_the_checkpoint(start):
    first = train_until_stopped(start(AtStep(11)))
    found = loss_steps(read_run(first.store.output_dir).log)
    assert found == list(range(1, 11))  # the last one is logged after its end
    with first.store.log_file.open("a") as file:
        file.write('{"step": 11, "lo')  # as a kill leaves it
    second = trained(start())
    content = second.store.log_file.read_text()
    assert [json.loads(line) for line in content.splitlines()] == second.state.log_history
    assert loss_steps(second.state.log_history) == list(range(1, 19))
    start().train()  # it is complete, and keeps its log
    assert second.store.log_file.read_text() == content
