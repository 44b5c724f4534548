"""Every number of an iteration is documented, and logged once, however often a run is stopped."""

import json
import re
from collections import Counter

import pytest
from conftest import ROOT
from peft import LoraConfig
from transformers import TrainerCallback

from spin_trl import SPINTrainer
from spin_trl.evaluation.metric_names import ITERATION, logged_values


def own_entries(trainer: SPINTrainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if ITERATION in entry]


def test_what_is_logged_and_what_is_documented_are_the_same(
    lora_server, tiny_model, train_dataset, eval_dataset, make_config
):
    config = make_config(num_iterations=2, vllm_server_base_url=lora_server.base_url)
    trainer = SPINTrainer(
        tiny_model, config, train_dataset=train_dataset, eval_dataset=eval_dataset, peft_config=LoraConfig(r=4)
    )
    trainer.train()
    logged = {name for entry in own_entries(trainer) for name in entry} - {"epoch", "step"}
    _, table, _ = (ROOT / "docs" / "metrics.md").read_text().split("| metric |")  # the other one is of rewards
    assert logged == set(re.findall(r"^\| `(.*?)`", table, re.MULTILINE))
    others = {name for entry in trainer.state.log_history if ITERATION not in entry for name in entry}
    assert not any(name.startswith(("self_play/", "eval_")) for name in others)


def test_every_iteration_has_every_number_and_history_is_not_counted_as_its_own(tiny_model, train_dataset, make_config):
    trainer = SPINTrainer(tiny_model, make_config(num_iterations=2), train_dataset=train_dataset)
    trainer.train()
    first, second = (trainer.store.read_metrics(iteration) for iteration in (0, 1))
    assert set(first) == set(second) - {"collapse_signs"}  # the tiny model may show one
    assert (second["num_pairs"], second["num_training_pairs"]) == (48, 96)
    pairs = trainer.store.read_pairs(1)
    own = [row for row in pairs if row["iteration"] == 1]
    logps, tokens = sum(row["ref_chosen_logps"] for row in own), sum(len(row["chosen_ids"]) for row in own)
    assert second["opponent_nll"] == pytest.approx(-logps / tokens)
    assert second["opponent_nll"] != first["opponent_nll"]  # another opponent
    assert min(second[name] for name in ("seconds_train", "tokens_per_second", "completions_per_second")) > 0


class Stop(TrainerCallback):
    """Ends the run as soon as the trainer logs a number of that name for that iteration, or takes that step."""

    def __init__(self, iteration: int = -1, name: str = "", step: int = -1):
        self.iteration, self.name, self.step = iteration, name, step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.name in logs and logs.get(ITERATION) == self.iteration:
            raise ZeroDivisionError

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise ZeroDivisionError


STOPS = [
    Stop(0, "eval_nll"),
    Stop(0, "self_play/num_pairs"),
    Stop(step=3),
    Stop(0, "self_play/seconds_train"),
    Stop(1, "eval_nll"),
    Stop(step=9),
    Stop(2, "eval_nll"),
]


def test_numbers_of_a_run_that_is_stopped_everywhere_are_logged_once(
    tiny_model, train_dataset, eval_dataset, make_config
):
    """Six steps in iteration 0 and twelve in iteration 1, a checkpoint every two: seven stops, then the end."""

    def start(*callbacks) -> SPINTrainer:
        config = make_config(num_iterations=2, save_strategy="steps", save_steps=2, resume="auto", temperature=0)
        return SPINTrainer(
            tiny_model, config, train_dataset=train_dataset, eval_dataset=eval_dataset, callbacks=list(callbacks)
        )

    for stop in STOPS:
        with pytest.raises(ZeroDivisionError):
            start(stop).train()
    trainer = start()
    trainer.train()
    entries = own_entries(trainer)
    names = Counter((entry[ITERATION], name) for entry in entries for name in entry)
    assert {key for key, count in names.items() if count > 1} <= {
        (iteration, name) for iteration in range(3) for name in (ITERATION, "epoch", "step")
    }
    for iteration in range(3):
        logged = {}
        for entry in entries:
            if entry[ITERATION] == iteration:
                logged |= entry
        expected = logged_values(trainer.store.read_metrics(iteration))
        assert {name: logged.get(name) for name in expected} == expected
    assert len([entry for entry in trainer.state.log_history if "loss" in entry]) == 18


def test_loss_of_an_iterations_last_step_is_logged_beside_its_numbers(tiny_model, train_dataset, make_config):
    trainer = SPINTrainer(tiny_model, make_config(num_iterations=1), train_dataset=train_dataset)
    trainer.train()
    at_the_end = [entry for entry in trainer.state.log_history if entry["step"] == 6]
    assert any("loss" in entry for entry in at_the_end)
    assert any("self_play/seconds_train" in entry for entry in at_the_end)


def test_lengths_are_kept_for_the_report(tiny_model, train_dataset, make_config):
    trainer = SPINTrainer(tiny_model, make_config(num_iterations=1), train_dataset=train_dataset)
    trainer.train()
    metrics = json.loads(trainer.store.path(0, "metrics.json").read_text())
    assert list(metrics["chosen_lengths"]) == list(metrics["rejected_lengths"]) == ["p10", "p50", "p90"]
