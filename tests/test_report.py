"""Reading a run directory, whole or not, and the page that is made of it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from small_run import ANSWERS, GAMES, cut_off, flip_a_bit, write_run
from tiny_tokenizers import byte_tokenizer

from spin_trl.report import write_report
from spin_trl.report.__main__ import main
from spin_trl.report.charts import Axes, Series, bar_chart, format_number, line_chart, nice_ticks
from spin_trl.report.page import render
from spin_trl.report.run_data import read_run
from spin_trl.report.sections import iteration_starts
from spin_trl.report.summary import remarks_of, scores_of, state_of, tiles_of
from spin_trl.run_directory.description import changed_settings
from spin_trl.run_directory.run_paths import RunDirectoryError


@pytest.fixture
def store(tmp_path):
    return write_run(tmp_path / "run")


# Reading


def test_reads_prompts_ground_truths_and_the_answers_of_every_iteration(store):
    run = read_run(store.output_dir)
    assert run.problems == []
    assert run.num_prompts == 2
    first, second = run.prompts
    assert first["prompt"] == [("", GAMES[0][0])] and first["truth"] == GAMES[0][1] and first["source_row"] == 10
    assert first["answers"] == {i: [{"text": ANSWERS[i][0], "cut_off": True}] for i in (0, 1)}
    assert second["answers"][1] == [{"text": "It is 4.", "cut_off": False}]


def test_counts_the_lengths_of_both_sides(store):
    run = read_run(store.output_dir)
    # "It is Paris." and "It is 4." with their end tokens: 13 and 9. The opponent's "It is London.": 14.
    assert {int(n): int(run.chosen_lengths[0][n]) for n in np.flatnonzero(run.chosen_lengths[0])} == {9: 1, 13: 1}
    assert {int(n): int(run.rejected_lengths[0][n]) for n in np.flatnonzero(run.rejected_lengths[0])} == {9: 1, 14: 1}


def test_reads_every_number_whatever_its_name(store):
    metrics = read_run(store.output_dir).metrics
    assert metrics[1]["never_heard_of"] == 8.5 and metrics[1]["percentiles/chosen/p50"] == 2.0
    assert scores_of(read_run(store.output_dir)) == {"nll": {0: 1.0, 1: 0.5, 2: 1 / 3}, "accuracy": {0: 0.5, 1: 0.6}}


def test_prompts_are_shown_as_the_run_keeps_them(store):
    tokenizer = byte_tokenizer()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Capital of France?"}]
    row = {"row": 0, "prompt": messages, "source_row": 0, "chosen_ids": tokenizer("Paris")["input_ids"]}
    store.write_data(Dataset.from_list([row]))
    (prompt,) = read_run(store.output_dir).prompts
    assert prompt["prompt"] == [("system", "Be brief."), ("user", "Capital of France?")] and prompt["truth"] == "Paris"


def test_a_sample_is_bounded_and_repeatable(tmp_path):
    games = [(f"{number}?", "yes") for number in range(50)]
    store = write_run(tmp_path / "run", games, {0: ["no"] * 50})
    rows = [[prompt["row"] for prompt in read_run(store.output_dir, 7, seed).prompts] for seed in (3, 3, 4)]
    assert len(rows[0]) == 7 and rows[0] == rows[1] != rows[2]
    assert read_run(store.output_dir, 7).num_prompts == 50
    assert "7 of 50 prompts, drawn at random with seed 3" in render(read_run(store.output_dir, 7, 3), 3)


# What is missing or damaged


def test_a_directory_that_holds_no_run_is_refused_by_the_command_too(tmp_path, capsys):
    with pytest.raises(RunDirectoryError, match=r"holds no self-play run: neither self_play.json nor iteration-0"):
        read_run(tmp_path)
    with pytest.raises(RunDirectoryError, match="is no directory"):
        read_run(tmp_path / "none")
    assert main([str(tmp_path)]) == 1 and "holds no self-play run" in capsys.readouterr().err


DAMAGES = {
    "part": ("iteration-0/generations/part-*", flip_a_bit, "damaged"),
    "torn part": ("iteration-0/generations/part-*", cut_off, "damaged"),
    "description": ("self_play.json", lambda path: path.write_text('{"model": '), "cannot be read"),
    "numbers": ("iteration-0/metrics.json", Path.unlink, "cannot be read, or not yet"),
    "log": ("log.jsonl", lambda path: path.write_text(path.read_text() + '{"step": 9, "lo'), r"1 line\(s\)"),
    "no log": ("log.jsonl", Path.unlink, "cannot be read, or not yet"),
    "data": ("train_data/rows.arrow", lambda path: path.write_bytes(b"torn"), "left out"),
}


@pytest.mark.parametrize(("file", "spoil", "problem"), DAMAGES.values(), ids=DAMAGES)
def test_what_is_missing_or_damaged_is_said_and_the_rest_shown(store, file, spoil, problem):
    (path,) = store.output_dir.glob(file)
    spoil(path)
    run = read_run(store.output_dir)
    (line,) = run.problems[:1]
    assert re.search(problem, line) and str(path.relative_to(store.output_dir)) in line
    assert run.metrics[1] and list(run.rejected_lengths)[-1] == 1
    assert f"{len(run.problems)} not shown in full" in render(run)


def test_a_run_that_has_only_begun_is_shown(tmp_path):
    store = write_run(tmp_path / "run", answers={}, finished=False)
    (store.output_dir / "iteration-0" / "generations").mkdir(parents=True)
    (store.output_dir / "log.jsonl").unlink()
    run = read_run(store.output_dir)
    assert "Iteration 0 has no completions (yet)." in run.problems
    assert state_of(run) == "in iteration 0 of 0 to 1, or stopped there"
    page = render(run)
    assert "Nothing has been logged yet." in page and "Nothing has been answered yet." in page


def test_without_a_tokenizer_there_the_models_is_taken_or_token_ids_are_shown(store, tmp_path):
    (store.output_dir / "tokenizer.json").unlink()
    run = read_run(store.output_dir)
    assert any("token ids are shown" in line for line in run.problems)
    assert re.fullmatch(r"\d+( \d+)*", run.prompts[0]["truth"])
    byte_tokenizer().save_pretrained(tmp_path / "model")
    store.write_run({**store.read_run(), "model": str(tmp_path / "model")})
    assert read_run(store.output_dir).prompts[0]["truth"] == GAMES[0][1]


# What is made of it


def test_the_numbers_at_the_top_and_what_stands_out(store):
    run = read_run(store.output_dir)
    tiles = {tile.name: (tile.value, tile.detail) for tile in tiles_of(run)}
    assert tiles["nll"] == ("1 → 0.3333", "start to after iteration 1")
    assert tiles["accuracy"] == ("0.5 → 0.6", "start to after iteration 0")
    assert tiles["Answers equal to the ground truth"][0] == "25.0 % → 50.0 %"
    assert tiles["Time between trainings"][0] == "2 min 11 s"  # 60 + 61 + 2 * 5
    assert state_of(run) == "complete, 2 iterations" and iteration_starts(run) == {1: 4}
    assert any("fell from 1 to 0.3333" in remark for remark in remarks_of(run))
    assert any("50.0 % of the last answers ran into" in remark for remark in remarks_of(run))
    assert not any("Sign of collapse" in remark for remark in remarks_of(run))
    run.metrics[1]["num_collapse_signs"] = 2
    assert any("Sign of collapse after iteration 0: " in remark for remark in remarks_of(run))


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.44, 0.97, [0.4, 0.6, 0.8, 1]),
        (3, 3, [1, 2, 3, 4, 5]),
        (0, 0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-7, 5, [-10, -5, 0, 5]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low, high, expected):
    assert nice_ticks(low, high) == expected


def test_numbers_are_written_alike_everywhere():
    written = [format_number(value) for value in (1000, 0.4462951, 4.4e-7, 12345.6, None, float("nan"))]
    assert written == ["1,000", "0.4463", "4.40e-07", "12,346", "–", "–"]
    assert format_number(0.2345, percent=True) == "23.4 %"


def test_a_curve_has_gaps_and_marks_and_a_table():
    axes = Axes("Loss & more", "step", marks={2.0: "iteration 1"})
    chart = line_chart(axes, [1, 2, 3, 4], [Series("a", [1.0, None, 2.0, 3.0]), Series("b", [0.0] * 4, "rejected")])
    assert "Loss &amp; more" in chart and "<title>iteration 1</title>" in chart
    assert re.search(r'class="line-accent" d="M[\d.]+ [\d.]+M[\d.]+ [\d.]+L', chart)
    assert '<tr><th scope="row">2</th><td>–</td><td>0</td></tr>' in chart


def test_long_curves_are_averaged():
    chart = line_chart(Axes("Loss", "step"), list(range(1, 2401)), [Series("loss", [1.0, 3.0] * 1200)])
    hover = json.loads(re.search(r'data-hover="(.*?)"', chart)[1].replace("&#34;", '"'))
    assert len(hover) == 240 and hover[0][1] == "step 10: loss 2"


def test_bars_lie_on_top_of_each_other_and_bars_of_nothing_are_no_chart():
    chart = bar_chart(Axes("", "x"), ["0"], [Series("a", [2.0]), Series("b", [2.0])])
    found = re.findall(r'<rect class="[\w-]+" x="([\d.]+)" y="([\d.]+)" width="[\d.]+" height="([\d.]+)"', chart)
    (x0, y0, height0), (x1, y1, height1) = (tuple(map(float, values)) for values in found)
    assert x0 == x1 and y1 == pytest.approx(y0 - height0, abs=0.11) and height0 == pytest.approx(height1, abs=0.11)
    assert bar_chart(Axes("", "x"), [], []) == bar_chart(Axes("", "x"), ["0"], [Series("a", [None])]) == ""


# The command


def test_the_command_writes_the_page_and_its_pictures_without_torch(store, tmp_path):
    code = (
        "import sys; from spin_trl.report.__main__ import main; sys.exit(main(sys.argv[1:]) or 'torch' in sys.modules)"
    )
    output = tmp_path / "out" / "page.html"
    command = [sys.executable, "-c", code, str(store.output_dir), "--output", str(output), "--pictures"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(output)
    assert "It is London." in output.read_text()
    pictures = sorted(path.name for path in (tmp_path / "out" / "report").iterdir())
    assert pictures == ["lengths.png", "rewards.png", "scores.png"]


def test_pictures_without_matplotlib_are_refused_if_asked_for(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'spin_trl\[report\]'"):
        write_report(store.output_dir, pictures=True)
    write_report(store.output_dir)
    assert not (store.output_dir / "report").exists()


def test_the_page_names_nothing_outside_itself(store):
    page = write_report(store.output_dir, pictures=False).read_text()
    assert "default-src 'none'" in page
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#)|url\(|@import|https?://""", page)


# The end of a run


def test_run_ends_with_its_report(play_run, capsys):
    trainer = play_run(num_iterations=1, report=True)
    page = (trainer.store.output_dir / "report.html").read_text()
    assert "complete, 1 iteration" in page and "settings that differ from the defaults" in page
    assert f"Report: {trainer.store.output_dir}/report.html" in capsys.readouterr().out


def test_report_that_fails_is_a_warning(build_trainer, caplog):
    trainer = build_trainer(num_iterations=1, report=True)
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
