"""What a run leaves to be looked at: `log.jsonl` as it goes, and `report.html` when it is over."""

import json

import pytest
from transformers import TrainerCallback

from spin_trl import SPINTrainer
from spin_trl.report.run_data import read_run
from spin_trl.run_directory.description import changed_settings


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise ZeroDivisionError("stopped by the test")


@pytest.fixture
def make_trainer(tiny_model, train_dataset, make_config):
    """48 rows in batches of 8: six steps in iteration 0, then with history twelve."""

    def make(*callbacks, **overrides) -> SPINTrainer:
        settings = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 4, "resume": "auto", "temperature": 0}
        config = make_config(**{**settings, **overrides})
        return SPINTrainer(tiny_model, config, train_dataset=train_dataset, callbacks=list(callbacks))

    return make


def entries(trainer: SPINTrainer) -> list[dict]:
    return [json.loads(line) for line in trainer.store.log_file.read_text().splitlines()]


def test_log_is_on_disk_as_it_is_made(make_trainer):
    trainer = make_trainer(StopAt(3))
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    steps = [entry["step"] for entry in entries(trainer) if "loss" in entry]
    assert steps == [1, 2]  # the third is logged after the step's end
    assert [entry["step"] for entry in read_run(trainer.store.output_dir).log if "loss" in entry] == steps


def test_resumed_run_forgets_what_was_logged_after_its_checkpoint(make_trainer):
    first = make_trainer(StopAt(11))
    with pytest.raises(ZeroDivisionError):
        first.train()
    with first.store.log_file.open("a") as file:
        file.write('{"step": 11, "lo')  # as a kill leaves it
    second = make_trainer()
    second.train()
    assert [entry["step"] for entry in entries(second) if "loss" in entry] == list(range(1, 19))
    assert entries(second) == second.state.log_history


def test_complete_run_keeps_its_log(make_trainer):
    first = make_trainer()
    first.train()
    before = first.store.log_file.read_text()
    make_trainer().train()
    assert first.store.log_file.read_text() == before


def test_overwritten_run_leaves_neither_log_nor_report(make_trainer):
    trainer = make_trainer()
    trainer.store.write_run({})
    for name in ("log.jsonl", "report.html"):
        (trainer.store.output_dir / name).write_text("old")
    trainer.store.clear()
    assert list(trainer.store.output_dir.iterdir()) == []


def test_report_that_fails_is_a_warning(make_trainer, caplog):
    trainer = make_trainer(num_iterations=1, report=True)
    (trainer.store.output_dir / "report.html").mkdir(parents=True)  # in its place
    trainer.train()
    assert trainer.store.read_run()["finished"]
    assert "The report is not written (" in caplog.text
    assert f"python -m spin_trl.report {trainer.store.output_dir}" in caplog.text


def test_settings_that_differ_from_the_defaults_are_named(make_config):
    changed = changed_settings(make_config(beta=0.3, loss_type=["hinge"]))
    assert {"beta", "loss_type", "learning_rate", "max_completion_length"} <= set(changed)
    unchanged = changed_settings(make_config(beta=0.1, learning_rate=5e-7))
    assert not {"beta", "loss_type", "learning_rate", "temperature", "optim", "seed", "output_dir"} & set(unchanged)


def test_run_ends_with_its_report_and_may_go_on_showing_more(make_trainer, capsys):
    trainer = make_trainer(StopAt(3))
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert not (trainer.store.output_dir / "report.html").exists()
    make_trainer(log_completions=True, report=True).train()
    page = (trainer.store.output_dir / "report.html").read_text()
    assert "complete, 2 iterations" in page and "settings that differ from the defaults" in page
    assert f"Report: {trainer.store.output_dir}/report.html" in capsys.readouterr().out
