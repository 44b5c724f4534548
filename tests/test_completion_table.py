"""`log_completions`: a few prompts, their ground truth and every opponent's answers, once in each iteration."""

import sys
import types

import pytest
from small_run import ANSWERS, GAMES, write_run
from tiny_tokenizers import byte_tokenizer
from transformers import TrainerControl, TrainerState

from spin_trl.report.completion_table import ShowCompletions


@pytest.fixture
def tracker(monkeypatch):
    """A factory of trackers that keep what is logged to them."""

    def make(name: str, run: object = True) -> types.ModuleType:
        module = types.ModuleType(name)
        module.run, module.logged, module.Table = run, [], lambda dataframe: dataframe
        module.log = module.logged.append
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return make


@pytest.fixture
def show(tmp_path, make_config):
    """A factory of tables of one small run."""

    def show(iteration: int, games: list = GAMES, answers: dict = ANSWERS, **settings):
        callback = ShowCompletions(write_run(tmp_path / "run", games, answers), byte_tokenizer())
        state = TrainerState(epoch=float(iteration), global_step=8, is_world_process_zero=True)
        callback.on_epoch_begin(make_config(**settings), state, TrainerControl())

    return show


def test_the_table_has_every_opponents_answer_so_far_as_it_is(show, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    show(1, games=[("2 + 2?", "It is [bold]4[/bold].")], answers={0: ["[red]5[/red]"], 1: ["4"], 2: ["later"]})
    shown = capsys.readouterr().out
    assert "Step 8" in shown and "Ground truth" in shown and "Iteration 1" in shown and "later" not in shown
    assert "It is [bold]4[/bold]." in shown and "[red]5[/red]" in shown  # no markup of rich's


def test_it_is_logged_to_the_trackers_that_the_run_reports_to(show, tracker):
    wandb, trackio = tracker("wandb"), tracker("trackio")
    show(1, report_to=["tensorboard", "trackio"])
    assert wandb.logged == []
    (frame,) = (entry["completions"] for entry in trackio.logged)
    columns = ["Iteration", "Prompt", "Ground truth", "Iteration 0", "Iteration 1"]
    rows = [(1, *game, ANSWERS[0][row], ANSWERS[1][row]) for row, game in enumerate(GAMES)]
    assert frame.to_dict("records") == [dict(zip(columns, row, strict=True)) for row in rows]
    show(0, report_to=["wandb"])
    assert list(wandb.logged[0]["completions"]["Iteration 0"]) == ANSWERS[0]
    not_begun = tracker("wandb", run=None)  # as on other processes
    show(0, report_to=["wandb"])
    assert not_begun.logged == []


def test_the_prompts_are_the_same_in_each_iteration_and_follow_the_seed(show, tracker):
    trackio = tracker("trackio")
    games = [(f"{number}?", "yes") for number in range(40)]
    for iteration, seed in ((0, 1), (1, 1), (1, 2)):
        show(iteration, games, {i: ["no"] * 40 for i in (0, 1)}, seed=seed, report_to=["trackio"])
    first, second, other = (list(entry["completions"]["Prompt"]) for entry in trackio.logged)
    assert len(set(first)) == 5 and first == second != other


def test_a_run_prints_it_once_in_each_iteration(play_run, capsys):
    play_run(8, num_iterations=2, log_completions=True)
    assert capsys.readouterr().out.count("Ground truth") == 2
