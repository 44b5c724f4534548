"""What `train()` does with a run that already lies in `output_dir`. Kills are in test_kill_and_resume.py."""

import itertools
import json
import os
import shutil
import signal
import threading
import time
from datetime import datetime
from functools import cache
from pathlib import Path

import pytest
from conftest import TINY_RUN, read_rows, trained
from datasets import Dataset
from peft import LoraConfig
from small_run import cut_off
from stopping import AtStep, assert_same_weights, fail, stop_after, train_until_stopped, weights
from transformers import AutoTokenizer

from spin_trl import SPINConfig, SPINTrainer
from spin_trl.run_directory.checkpoints import Place
from spin_trl.run_directory.store import IterationStore, RunDirectoryError


SETTINGS = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 4, "resume": "auto", "temperature": 0}


def build(model: str, output_dir: Path, *callbacks, rows=slice(48), adapter=4, eval_dataset=None, **overrides):
    """48 rows in batches of 8: six steps in iteration 0, then with history twelve in each. `adapter` is its rank."""
    return SPINTrainer(
        model,
        SPINConfig(**{**TINY_RUN, **SETTINGS, "output_dir": str(output_dir), **overrides}),
        train_dataset=Dataset.from_list(read_rows("accent_train.jsonl", 49)[rows]),
        eval_dataset=eval_dataset,
        callbacks=list(callbacks),
        peft_config=LoraConfig(r=adapter) if adapter else None,
    )


@pytest.fixture
def make_trainer(tiny_model, tmp_path):
    def make(*callbacks, output_dir=tmp_path / "run", **overrides) -> SPINTrainer:
        return build(tiny_model, output_dir, *callbacks, **overrides)

    return make


@pytest.fixture(scope="module")
def played(tiny_model, tmp_path_factory):
    """A function that gives directory and weights of a run that was stopped at a step, or, without one, is complete."""

    @cache
    def play(step: int | None = None) -> tuple[Path, dict]:
        folder = tmp_path_factory.mktemp("played") / "run"
        trainer = build(tiny_model, folder, *([] if step is None else [AtStep(step)]))
        _ = trainer.train() if step is None else train_until_stopped(trainer)
        return folder, weights(trainer)

    return play


@pytest.fixture
def expected(played) -> dict:
    """The weights that a run comes to."""
    return played()[1]


@pytest.fixture
def lies_there(played, tmp_path):
    """A function that puts such a run where `make_trainer`'s trainers run."""
    return lambda step=None: IterationStore(shutil.copytree(played(step)[0], tmp_path / "run"))


def times_of(directory: Path) -> dict[Path, int]:
    """When each part of the answers was written."""
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*.parquet")}


# Going on


@pytest.mark.parametrize(
    ("resume", "argument"), [("auto", None), ("never", True), ("auto", "true")], ids=["setting", "argument", "text"]
)
def test_stopped_run_goes_on_however_it_is_asked_to(make_trainer, lies_there, expected, resume, argument):
    lies_there(11)
    trainer = trained(make_trainer(resume=resume), argument)
    assert_same_weights(trainer, expected)
    assert trainer.state.global_step == 18
    assert [start["from"] for start in trainer.store.read_run()["starts"]] == ["the initial model", "checkpoint-8"]


@pytest.mark.parametrize(("step", "alpha"), [(4, 0.0), (11, 1.0)])
def test_full_fine_tuning_goes_on_too(make_trainer, tmp_path, step, alpha):
    settings = {"adapter": None, "reference_mixture_alpha": alpha, "learning_rate": 1e-4}
    undisturbed = trained(make_trainer(output_dir=str(tmp_path / "undisturbed"), **settings))
    stop_after(make_trainer, step, **settings)
    trainer = trained(make_trainer(**settings))
    assert_same_weights(trainer, weights(undisturbed))


def test_iteration_ends_in_a_checkpoint_that_is_whole_for_which_older_ones_make_room(make_trainer):
    trainer = trained(make_trainer(save_steps=1000, save_total_limit=1))
    (checkpoint,) = trainer.store.checkpoints()
    place = Place.read(checkpoint)
    assert (place.iteration, place.step, place.first_step, place.is_iteration_done) == (1, 18, 6, True)
    assert checkpoint.name == "checkpoint-18" and (checkpoint / "optimizer.pt").exists()


def test_finished_run_is_not_played_again_but_its_policy_is_there(make_trainer, lies_there, expected, capsys):
    before = times_of(lies_there().output_dir)
    again = trained(make_trainer(AtStep(1)))
    assert_same_weights(again, expected)
    assert times_of(again.store.output_dir) == before
    assert "The run in `output_dir` is complete" in capsys.readouterr().out


def test_finished_run_is_played_on_when_iterations_are_added(make_trainer, expected):
    make_trainer(num_iterations=1).train()
    trainer = trained(make_trainer())
    assert_same_weights(trainer, expected)


def test_run_capped_by_max_steps_is_complete_there(make_trainer):
    make_trainer(max_steps=9).train()
    again = trained(make_trainer(AtStep(10), max_steps=9))
    assert again.state.global_step == 9


def test_evaluation_that_is_missing_at_the_end_is_made_up_for(make_trainer, eval_dataset, at_forward, tmp_path, capsys):
    settings = {"num_iterations": 1, "eval_dataset": eval_dataset}
    at_forward(fail, lambda: (tmp_path / "run" / "iteration-1").exists())
    train_until_stopped(make_trainer(**settings))
    second = trained(make_trainer(**settings))
    assert "evaluation" in second.store.read_metrics(1) and second.store.read_run()["finished"]
    assert second.state.global_step == 6
    rows = capsys.readouterr().out
    assert rows.count("start ") == 2 and rows.count("iteration 0  ") == 1


def test_checkpoint_that_is_asked_for_takes_the_run_back_there(make_trainer, lies_there, expected):
    store = lies_there()
    made = times_of(store.path(1))
    trainer = trained(make_trainer(), str(store.output_dir / "checkpoint-4"))
    assert_same_weights(trainer, expected)
    assert times_of(store.path(1)) != made


def test_run_without_checkpoints_goes_on_from_its_first_generations(make_trainer):
    """They are the initial model's, which is always there; everything later is lost, and said to be."""
    first = stop_after(make_trainer, 11, save_strategy="no")
    made = times_of(first.store.path(0))
    assert made and first.store.iterations() == [0, 1]
    with pytest.raises(RunDirectoryError, match="Make a new trainer"):  # this one's policy is no longer the initial one
        first.train()
    trainer = trained(make_trainer(save_strategy="no"))
    assert trainer.state.global_step == 18
    assert times_of(first.store.path(0)) == made


def test_seconds_of_a_phase_add_up_over_stops(make_trainer, at_forward, tmp_path):
    at_forward(fail, lambda: any((tmp_path / "run" / "iteration-0" / "generations").glob("part-*")))
    first = train_until_stopped(make_trainer())
    first.store.write_metrics(0, {"seconds_generate": 1000.0})
    second = trained(make_trainer(num_iterations=2))
    assert 1000.0 < second.store.read_metrics(0)["seconds_generate"] < 1100.0


@pytest.mark.parametrize("began", ["2026-01-02T23:59:00+0000", None])
def test_prompts_of_a_run_have_the_date_of_the_day_it_began(tiny_model, tmp_path, began):
    """Templates write one, as Llama 3.2's. A run that goes on the next day would else be of other data."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{{ strftime_now('%B') | lower }}{% for m in messages %}{{ m.content }}{% endfor %}"
    rows = [{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "B"}]}]
    if began:
        IterationStore(tmp_path).write_run({"starts": [{"time": began}]})
    config = SPINConfig(**{**TINY_RUN, "output_dir": str(tmp_path)})
    trainer = SPINTrainer(tiny_model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    month = "january" if began else f"{datetime.now():%B}".lower()
    assert tokenizer.decode(trainer.plan.data.train["prompt_ids"][0]) == f"{month}a"


def test_batches_may_be_divided_otherwise_as_long_as_they_are_as_large(make_trainer, lies_there):
    lies_there(5)
    trainer = trained(make_trainer(per_device_train_batch_size=4, gradient_accumulation_steps=2, logging_steps=3))
    assert trainer.state.global_step == 18


# Refusals


def another(difference: str) -> tuple:
    """The refusal of a run of another kind, with what differs."""
    return RunDirectoryError, rf"another configuration or other data(.|\n)*{difference}"


@pytest.mark.parametrize(
    ("settings", "argument", "error", "message"),
    [
        ({"resume": "never"}, None, FileExistsError, r"iterations \[0\].*resume='auto'.*overwrite_output_dir=True"),
        ({"overwrite_output_dir": True}, True, ValueError, "contradicts `overwrite_output_dir=True`"),
        ({"output_dir": "{}/nowhere"}, True, RunDirectoryError, "There is no run to resume in `output_dir`"),
        ({"beta": 0.2, "resume": "never"}, True, *another(r"`beta`: 0\.1 there, 0\.2 now")),
        ({}, "{}/checkpoint-4", RunDirectoryError, "does not lie in `output_dir`"),
        ({}, "{}/run/checkpoint-5", RunDirectoryError, "cannot be resumed from: it holds no self_play.json"),
        ({"per_device_train_batch_size": 4}, None, *another(r"`training\.total_train_batch_size`: 8 there, 4 now")),
        ({"adapter": 8}, None, *another("`adapter`: .*'r': 4.* there, .*'r': 8.* now")),
        ({"rows": slice(1, 49)}, None, *another(r"`data\.train_checksum`")),
    ],
)
def test_run_is_neither_resumed_nor_deleted_where_that_is_not_clear(
    make_trainer, lies_there, tmp_path, settings, argument, error, message
):
    shutil.copytree(lies_there(5).output_dir / "checkpoint-4", tmp_path / "checkpoint-4")
    place = {name: value.format(tmp_path) if name == "output_dir" else value for name, value in settings.items()}
    argument = argument.format(tmp_path) if isinstance(argument, str) else argument
    with pytest.raises(error, match=message):
        make_trainer(**place).train(resume_from_checkpoint=argument)


def test_second_run_on_the_same_directory_is_refused(make_trainer):
    with pytest.raises(RunDirectoryError, match="Another process is running"):
        make_trainer(AtStep(2, lambda: make_trainer().train())).train()


def test_iterations_without_a_description_are_refused(make_trainer, lies_there):
    (lies_there(5).output_dir / "self_play.json").unlink()
    with pytest.raises(RunDirectoryError, match=r"holds iterations \[0\], but no self_play.json"):
        make_trainer().train()


def test_complete_run_that_left_no_checkpoint_is_left_alone(make_trainer, lies_there):
    for checkpoint in lies_there().checkpoints():
        shutil.rmtree(checkpoint)
    with pytest.raises(RunDirectoryError, match="complete, but left no checkpoint"):
        make_trainer().train()


# Checkpoints that do not fit


def place_file(change):
    """A change of the checkpoint's `self_play.json`."""

    def spoil(checkpoint: Path) -> None:
        path = checkpoint / "self_play.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

    return spoil


SPOILED = {
    "no place": lambda checkpoint: (checkpoint / "self_play.json").unlink(),
    "torn place": lambda checkpoint: (checkpoint / "self_play.json").write_text('{"run_id": '),
    "another run": place_file({"run_id": "another"}),
    "other pairs": place_file({"pairs": "0123456789abcdef"}),
    "no optimizer": place_file({"holds_optimizer": False}),
    "damaged pairs": lambda checkpoint: cut_off(checkpoint.parent / "iteration-1" / "pairs" / "rows.arrow"),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_newest_checkpoint_that_fits_is_taken(make_trainer, lies_there, expected, spoil):
    """Of checkpoint-8, within iteration 1, and checkpoint-6, at the end of iteration 0."""
    spoil(lies_there(9).output_dir / "checkpoint-8")
    trainer = trained(make_trainer())
    assert trainer.store.read_run()["starts"][-1]["from"] == "checkpoint-6"
    assert_same_weights(trainer, expected)


def test_pairs_of_the_history_cannot_be_made_again(make_trainer, at_forward, tmp_path):
    at_forward(fail, lambda: (tmp_path / "run" / "iteration-1").exists())
    first = train_until_stopped(make_trainer())
    next(first.store.path(0, "pairs").glob("*.arrow")).unlink()
    with pytest.raises(RunDirectoryError, match="iteration-0/pairs is damaged or missing.*num_history_iterations"):
        make_trainer().train()


def test_what_lies_behind_the_checkpoint_that_a_run_goes_on_from_is_deleted(make_trainer, lies_there):
    """A whole one, and one whose save was cut short; what was there before the run stays."""
    output_dir = lies_there(9).output_dir
    (output_dir / "checkpoint-20").mkdir()
    os.utime(output_dir / "checkpoint-20", (0, 0))
    (output_dir / "checkpoint-9").mkdir()
    trainer = make_trainer(AtStep(7), save_steps=1000)
    with pytest.raises(ZeroDivisionError):
        trainer.train(resume_from_checkpoint=str(output_dir / "checkpoint-4"))
    found = sorted(path.name for path in output_dir.glob("checkpoint-*"))
    assert found == ["checkpoint-20", "checkpoint-4", "checkpoint-6"]


# SIGTERM


def terminate(number: int = signal.SIGTERM):
    os.kill(os.getpid(), number)


def terminate_twice(seconds: float, number: int = signal.SIGTERM):
    terminate(number)
    time.sleep(seconds)
    terminate(number)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, SystemExit(143)), (signal.SIGINT, KeyboardInterrupt())])
def test_signal_in_training_leaves_a_checkpoint_of_that_step(make_trainer, expected, number, error):
    """The launcher passes it on, so that it comes twice."""
    before = signal.getsignal(number)
    trainer = make_trainer(AtStep(9, lambda: terminate_twice(0.0, number)), save_steps=1000)
    with pytest.raises(type(error)) as caught:
        trainer.train()
    assert caught.value.args == error.args and trainer.state.global_step in (9, 10)
    assert trainer.store.checkpoints()[0].name == f"checkpoint-{trainer.state.global_step}"
    assert "finished" not in trainer.store.read_run()
    assert signal.getsignal(number) is before
    again = trained(make_trainer(save_steps=1000))
    assert_same_weights(again, expected)


def test_sigterm_while_generating_ends_at_once(make_trainer, at_forward):
    """In the third of six batches of up to twelve tokens."""
    forwards = itertools.count(1)
    settings = {"per_device_generation_batch_size": 2}
    at_forward(terminate, lambda: next(forwards) == 30)
    trainer = make_trainer(**settings)
    with pytest.raises(SystemExit):
        trainer.train()
    assert next(forwards) == 31 and not trainer.store.has_pairs(0)
    again = trained(make_trainer(**settings))
    assert again.state.global_step == 18


class Destroyed:
    def __del__(self):
        terminate()
        sum(range(1000))  # the signal is heard in here


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_sigterm_that_is_heard_in_a_destructor_is_not_lost(make_trainer, at_forward):
    """Python drops what it raises there. The run ends when what it does between steps is done."""
    at_forward(lambda: Destroyed() and None)
    trainer = make_trainer()
    with pytest.raises(SystemExit) as caught:
        trainer.train()
    assert caught.value.code == 143 and trainer.state.global_step == 0


class TerminatedAtItsEnd(SPINTrainer):
    """When all training is done, and the policy is merged, described and pushed."""

    is_described = False

    def create_model_card(self, *args, **kwargs):
        is_finished = self.store.read_run().get("finished", False)
        if is_finished:
            terminate()
        super().create_model_card(*args, **kwargs)
        self.is_described = is_finished


def test_signal_after_the_last_step_ends_the_run_at_once(make_trainer, tiny_model):
    given = make_trainer(num_iterations=1).plan
    trainer = TerminatedAtItsEnd(tiny_model, given.args, train_dataset=given.train_dataset)
    with pytest.raises(SystemExit):
        trainer.train()
    assert not trainer.is_described and trainer.store.read_run()["finished"]


def test_second_sigterm_does_not_wait_for_the_step(make_trainer):
    trainer = make_trainer(AtStep(2, lambda: terminate_twice(1.1)), save_steps=1000)
    with pytest.raises(SystemExit):
        trainer.train()
    assert trainer.store.checkpoints() == []


def test_training_outside_the_main_thread_leaves_signals_alone(make_trainer):
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=make_trainer(num_iterations=1).train)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
