"""The recipes as one runs them: parsed, launched, and on two processes."""

import json
import os
import runpy
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import DATA, RECIPES, ROOT, load_recipe
from trl import ModelConfig, TrlParser

from spin_trl import SPINConfig, load_pairs


CONFIGS = sorted(RECIPES.glob("*.yaml"))


def parse(recipe: str, *arguments: str) -> tuple:
    """Script, training and model arguments of a recipe, as its command line has them, on a CPU."""
    parser = TrlParser((load_recipe("spin").SPINScriptArguments, SPINConfig, ModelConfig))
    command = ["--config", str(RECIPES / f"{recipe}.yaml"), "--use_cpu", "true", "--bf16", "false", *arguments]
    return parser.parse_args_and_config(command)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_parses_into_a_valid_configuration_and_says_what_it_is_for(path):
    script_args, training_args, model_args = parse(path.stem)
    assert script_args.train_file and model_args.model_name_or_path
    assert training_args.num_train_epochs == training_args.num_iterations * training_args.epochs_per_iteration
    for word in ("Purpose:", "Hardware:", "Launch:", "Override:"):
        assert f"# {word}" in path.read_text()


def test_command_line_overrides_the_yaml_file():
    _, training_args, model_args = parse("pronunciation", "--num_iterations", "2", "--lora_r", "4")
    assert (training_args.num_iterations, model_args.lora_r, training_args.beta) == (2, 4, 0.1)


def test_papers_recipe_has_the_papers_settings():
    _, args, model_args = parse("zephyr-7b-full")
    assert not model_args.use_peft and model_args.model_revision == "ac6e600eefcce74f5e8bae1035d4f66019e93190"
    assert (args.max_length, args.max_completion_length) == (1024, 256)
    assert [args.learning_rate_at(i) for i in range(4)] == [5e-7, 5e-7, 1e-7, 1e-7]
    assert [args.beta_at(i) for i in range(4)] == [0.1, 0.1, 0.1, 5.0]
    assert (args.num_iterations, args.epochs_per_iteration, args.num_history_iterations) == (4, 2, 1)
    assert (args.optim, args.weight_decay, args.warmup_steps) == ("rmsprop", 0, 0.1)
    assert (args.lr_scheduler_type, args.loss_type, args.reset_optimizer) == ("linear", ["sigmoid"], True)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * 4 == 64


def test_launch_configurations_leave_optimizer_and_scheduler_to_the_run():
    paths = sorted((RECIPES / "accelerate").glob("*.yaml"))
    assert [path.stem for path in paths] == ["ddp", "fsdp2", "single", "zero2", "zero3"]
    for path in paths:
        assert path.read_text().startswith("# Purpose:")
        assert not {"optimizer", "scheduler"} & set(yaml.safe_load(path.read_text()).get("deepspeed_config", {}))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "prompt,completion\na;,b\n"),
        ("b.csv", "\ufeffprompt;completion\na;b\n"),
        ("c.tsv", "prompt\tcompletion\na\tb\n"),
    ],
)
def test_tables_are_read_whatever_separates_their_columns(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert load_recipe("spin").load_file(str(tmp_path / name)).column_names == ["prompt", "completion"]


@pytest.mark.parametrize(
    ("argument", "value", "found"),
    [
        ("--num_iterations", "0", "`num_iterations` must be at least 1, got 0"),
        ("--train_file", "no.jsonl", "'no.jsonl', which is no file"),
        ("--config", "unknown.yaml", "'--num_iteration'"),
    ],
)
def test_users_mistake_is_told_without_a_traceback(argument, value, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unknown.yaml").write_text("num_iteration: 2\n")
    monkeypatch.setattr(
        sys, "argv", ["spin.py", "--output_dir", "run", "--model_name_or_path", "none", argument, value]
    )
    with pytest.raises(SystemExit, match="ValueError: ") as refusal:
        runpy.run_path(str(ROOT / "recipes" / "spin.py"), run_name="__main__")
    assert found in str(refusal.value)


@pytest.fixture
def few_words(tmp_path) -> list[str]:
    """Arguments for the demo on some of its words and the tiny model, in a folder of the test's own."""

    def few(kind: str, number: int) -> str:
        words = (DATA / f"accent_{kind}.jsonl").read_text().splitlines(keepends=True)[:number]
        (tmp_path / f"{kind}.jsonl").write_text("".join(words))
        return str(tmp_path / f"{kind}.jsonl")

    arguments = ["--train_file", few("train", 120), "--eval_file", few("test", 16)]
    return [*arguments, "--output_dir", str(tmp_path / "run"), "--num_iterations", "2", "--epochs_per_iteration", "1"]


def scores(output: str) -> list[str]:
    """The table's rows."""
    return [line for line in output.splitlines() if line.startswith(("start ", "iteration "))]


def test_demo_prints_its_table_and_the_same_command_again_finds_the_run_complete(
    tiny_model, few_words, tmp_path, capsys, monkeypatch
):
    """And `--resume_from_checkpoint true` is understood as text, which is what a command line gives."""
    monkeypatch.chdir(ROOT)
    spin = load_recipe("spin")
    parser = TrlParser((spin.SPINScriptArguments, SPINConfig, ModelConfig))

    def play(*more: str) -> str:
        in_process = ["--model_name_or_path", tiny_model, *few_words, "--use_vllm", "false", *more]
        spin.main(*parser.parse_args_and_config(["--config", "recipes/pronunciation.yaml", *in_process]))
        return capsys.readouterr().out

    first, again = play(), play("--resume_from_checkpoint", "true")
    assert ["after", "nll", "word_accuracy", "phone_error_rate"] in [line.split() for line in first.splitlines()]
    assert [row.split()[:2] for row in scores(first)][1:] == [["iteration", "0"], ["iteration", "1"]]
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert "The run in `output_dir` is complete; its final policy is checkpoint-8." in again
    assert scores(again) == scores(first)


def test_two_processes_play_the_demo_with_pairs_for_every_prompt_once(tiny_model, few_words, tmp_path):
    """The demo's configuration on two gloo processes against one managed vLLM server: 120 prompts, two iterations."""
    launch = "--multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 --mixed_precision no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch.split(), "recipes/spin.py"]
    command += ["--config", "recipes/pronunciation.yaml", "--model_name_or_path", tiny_model, *few_words]
    command += ["--per_device_generation_batch_size", "12"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    rows = list(range(120))
    for iteration in (0, 1):
        folder = tmp_path / "run" / f"iteration-{iteration}"
        assert sorted(load_pairs(tmp_path / "run", iteration)["row"]) == rows
        parts = [pq.read_table(part)["row"].to_pylist() for part in sorted((folder / "generations").iterdir())]
        assert sorted(row for part in parts for row in part) == rows
        assert len(parts) == 3  # of 48 prompts, four batches of 12
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["publish_check_difference"] < 1e-4
    assert "word_accuracy" in done.stdout and len(scores(done.stdout)) == 3  # printed by one process only
