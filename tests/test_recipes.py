"""The recipes as one runs them: parsed, launched, and on two processes."""

import json
import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import RECIPES, ROOT, load_recipe
from trl import ModelConfig, TrlParser

from spin_trl import SPINConfig, load_pairs


CONFIGS = sorted(RECIPES.glob("*.yaml"))
LAUNCH = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def parse(recipe: str, *arguments: str) -> tuple:
    """Script, training and model arguments of a recipe, as its command line has them, on a CPU."""
    parser = TrlParser((load_recipe("spin").SPINScriptArguments, SPINConfig, ModelConfig))
    command = ["--config", str(RECIPES / f"{recipe}.yaml"), "--use_cpu", "true", "--bf16", "false", *arguments]
    return parser.parse_args_and_config(command)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_parses_into_a_valid_configuration(path):
    script_args, training_args, model_args = parse(path.stem)
    assert script_args.train_file and model_args.model_name_or_path
    assert training_args.num_train_epochs == training_args.num_iterations * training_args.epochs_per_iteration


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_opens_with_purpose_hardware_and_launch_command(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("Purpose:", "Hardware:", "Launch:", "Override:"):
        assert any(line.startswith(f"# {word}") for line in header), word


def test_command_line_overrides_the_yaml_file():
    _, training_args, model_args = parse("pronunciation", "--num_iterations", "2", "--lora_r", "4")
    assert (training_args.num_iterations, model_args.lora_r, training_args.beta) == (2, 4, 0.1)


def test_chat_model_recipe_has_the_settings_of_the_readmes_example():
    _, args, model_args = parse("qwen2.5-7b-instruct-lora")
    assert model_args.model_name_or_path == "Qwen/Qwen2.5-7B-Instruct" and model_args.use_peft
    assert (args.num_iterations, args.beta, args.learning_rate) == (3, 0.1, 5e-7)
    assert (args.temperature, args.max_completion_length) == (0.7, 1024)


def test_papers_recipe_has_the_papers_settings():
    _, args, model_args = parse("zephyr-7b-full")
    assert not model_args.use_peft
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


def run(command: list[str]) -> subprocess.CompletedProcess:
    env = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done


def test_demo_launches_with_accelerate_and_prints_its_table(tiny_model, tmp_path):
    """The demo's own configuration and data, cut to a few steps and in-process."""
    overrides = ["--model_name_or_path", tiny_model, "--output_dir", str(tmp_path / "run"), "--max_steps", "10"]
    config = (RECIPES / "pronunciation.yaml").read_text().replace("use_vllm: true\n", "use_vllm: false\n")
    (tmp_path / "demo.yaml").write_text(config)
    command = ["accelerate", "launch", "--cpu", "--num_cpu_threads_per_process", "1", *LAUNCH, "recipes/spin.py"]
    done = run([*command, "--config", str(tmp_path / "demo.yaml"), *overrides])
    table = [line.split() for line in done.stdout.splitlines()]
    assert ["after", "nll", "word_accuracy", "phone_error_rate"] in table
    assert [line[0] for line in table if len(line) in (4, 5)][-2:] == ["start", "iteration"]
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_same_command_again_finds_the_run_complete(tiny_model, tmp_path):
    """And `--resume_from_checkpoint true` is understood as text, which is what a command line gives."""
    arguments = ["--config", "recipes/pronunciation.yaml", "--model_name_or_path", tiny_model, "--max_steps", "3"]
    arguments += ["--output_dir", str(tmp_path / "run")]
    config = (RECIPES / "pronunciation.yaml").read_text().replace("use_vllm: true\n", "use_vllm: false\n")
    (tmp_path / "demo.yaml").write_text(config)
    arguments[1] = str(tmp_path / "demo.yaml")
    first = run(["python", "recipes/spin.py", *arguments])
    again = run(["python", "recipes/spin.py", *arguments, "--resume_from_checkpoint", "true"])
    assert "The run in `output_dir` is complete; its final policy is checkpoint-3." in again.stdout
    table = [line for line in first.stdout.splitlines() if line.startswith(("start ", "iteration 0 "))]
    assert len(table) == 2 and [line for line in again.stdout.splitlines() if line in table] == table


def test_two_processes_play_the_demo_with_pairs_for_every_prompt_once(tiny_model, tmp_path):
    """The demo's configuration on two gloo processes against one managed vLLM server: 200 prompts, two iterations."""
    folder = ROOT / "recipes" / "data" / "pronunciation"
    for kind, size in (("train", 200), ("test", 50)):
        lines = (folder / f"accent_{kind}.jsonl").read_text().splitlines()[:size]
        (tmp_path / f"{kind}.jsonl").write_text("\n".join(lines))
    command = ["torchrun", "--nproc_per_node", "2", "--master_port", "29631", "recipes/spin.py"]
    command += ["--config", "recipes/pronunciation.yaml", "--model_name_or_path", tiny_model]
    command += ["--train_file", str(tmp_path / "train.jsonl"), "--eval_file", str(tmp_path / "test.jsonl")]
    command += ["--output_dir", str(tmp_path / "run"), "--num_iterations", "2", "--epochs_per_iteration", "1"]
    done = run([*command, "--per_device_generation_batch_size", "12"])
    rows = list(range(200))
    for iteration in (0, 1):
        folder = tmp_path / "run" / f"iteration-{iteration}"
        assert sorted(load_pairs(tmp_path / "run", iteration)["row"]) == rows
        parts = [pq.read_table(part)["row"].to_pylist() for part in sorted((folder / "generations").iterdir())]
        assert sorted(row for part in parts for row in part) == rows
        assert len(parts) == 5  # of 48 prompts, four batches of 12
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["publish_check_difference"] < 1e-4
    assert done.stdout.count("word_accuracy") >= 1
    assert sum(line.startswith("start ") for line in done.stdout.splitlines()) == 1  # printed by one process only
