"""`log_completions`: a few prompts, their ground truth and every opponent's answers, once in each iteration."""

import sys
import types

import pytest
from datasets import Dataset
from small_run import ANSWERS, GAMES, write_run
from tiny_tokenizers import byte_tokenizer

from spin_trl import SPINTrainer
from spin_trl.report.completion_table import (
    CompletionSample,
    _active_trackers,
    _as_frame,
    print_samples,
    sample_completions,
)


SAMPLES = [CompletionSample("2 + 2?", "It is [bold]4[/bold].", {0: "5\nor so", 1: "[red]4[/red]"})]


@pytest.fixture
def dataset() -> Dataset:
    tokenizer = byte_tokenizer()
    rows = [
        {"row": row, "prompt_ids": tokenizer(prompt)["input_ids"], "chosen_ids": tokenizer(truth)["input_ids"]}
        for row, (prompt, truth) in enumerate(GAMES)
    ]
    return Dataset.from_list(rows)


def test_sample_has_every_opponents_answer_so_far(tmp_path, dataset):
    store = write_run(tmp_path / "run")
    samples = sample_completions(store, dataset, 1, byte_tokenizer(), 5, seed=0)
    assert samples == [CompletionSample(*game, {i: ANSWERS[i][row] for i in (0, 1)}) for row, game in enumerate(GAMES)]
    assert sample_completions(store, dataset, 0, byte_tokenizer(), 5, seed=0)[0].answers == {0: ANSWERS[0][0]}


def test_sample_is_of_the_same_prompts_in_each_iteration_and_follows_the_seed(tmp_path):
    games = [(f"{number}?", "yes") for number in range(40)]
    store = write_run(tmp_path / "run", games, {i: ["no"] * 40 for i in (0, 1)})
    tokenizer = byte_tokenizer()
    rows = [{"row": n, "prompt_ids": tokenizer(p)["input_ids"], "chosen_ids": [1]} for n, (p, _) in enumerate(games)]
    chosen = [
        [sample.prompt for sample in sample_completions(store, Dataset.from_list(rows), iteration, tokenizer, 6, seed)]
        for iteration, seed in ((0, 1), (1, 1), (1, 2))
    ]
    assert len(set(chosen[0])) == 6 and chosen[0] == chosen[1] != chosen[2]


def test_plain_lines_where_there_is_no_terminal(capsys):
    print_samples(SAMPLES, 1)
    assert capsys.readouterr().out.splitlines() == [
        "Completions of iteration 1:",
        "  prompt        '2 + 2?'",
        "  ground truth  'It is [bold]4[/bold].'",
        r"  iteration 0   '5\nor so'",
        "  iteration 1   '[red]4[/red]'",
    ]


def test_table_on_a_terminal_shows_text_as_it_is(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    print_samples(SAMPLES, 1)
    shown = capsys.readouterr().out
    assert "Completions of iteration 1" in shown and "│" in shown
    assert "It is [bold]4[/bold]." in shown and "[red]4[/red]" in shown  # no markup of rich's


def tracker(name: str, run: object = True) -> types.ModuleType:
    module = types.ModuleType(name)
    module.run, module.logged, module.Table = run, [], lambda dataframe: dataframe
    module.log = module.logged.append
    return module


def test_trackers_are_those_that_the_run_reports_to(monkeypatch):
    wandb, trackio = tracker("wandb"), tracker("trackio")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    assert _active_trackers(["tensorboard"]) == []
    assert _active_trackers(["wandb", "trackio"]) == [wandb, trackio]
    wandb.run = None  # not begun, as on other processes
    assert _active_trackers(["wandb"]) == []


def test_frame_has_a_row_for_each_prompt():
    assert _as_frame(SAMPLES, 1).to_dict("records") == [
        {
            "iteration": 1,
            "prompt": "2 + 2?",
            "ground_truth": "It is [bold]4[/bold].",
            "iteration_0": "5\nor so",
            "iteration_1": "[red]4[/red]",
        }
    ]


def test_run_prints_and_logs_once_in_each_iteration(tiny_model, train_dataset, make_config, capsys, monkeypatch):
    trackio = tracker("trackio")
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    monkeypatch.setattr("trl.trainer.base_trainer.get_trackio_space_url", lambda: None)  # for the card; wants the real
    config = make_config(num_iterations=2, log_completions=True, num_completions_to_print=3)
    trainer = SPINTrainer(tiny_model, config, train_dataset=train_dataset)
    trainer.args.report_to = ["trackio"]  # its own callback, which needs the real one, is not asked for
    trainer.train()
    printed = capsys.readouterr().out
    assert [printed.count(f"Completions of iteration {i}:") for i in (0, 1)] == [1, 1]
    frames = [entry["completions"] for entry in trackio.logged]
    assert [len(frame) for frame in frames] == [3, 3]
    assert list(frames[0]["prompt"]) == list(frames[1]["prompt"])
    assert list(frames[0]["iteration_0"]) == list(frames[1]["iteration_0"])


def test_number_of_prompts_must_be_positive(make_config):
    with pytest.raises(ValueError, match="`num_completions_to_print` must be at least 1, got 0"):
        make_config(num_completions_to_print=0)
