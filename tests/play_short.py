"""A short self-play run in a process of its own: `python play_short.py '{"model": ..., "config": {...}}'`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from stopping import AtStep

from spin_trl import SPINConfig, SPINTrainer


DATA = Path(__file__).parents[1] / "recipes" / "data" / "pronunciation"


def read_rows(name: str, num_rows: int) -> list[dict]:
    """As `conftest`'s, which switches the hub off."""
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()[:num_rows]]


def play(model: str, config: dict, lora: bool = True, num_rows: int = 16, fail_at: int = -1, push: bool = False):
    settings = {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "max_completion_length": 8,
        "use_vllm": False,
        "identical_pairs": "keep",
        "num_iterations": 2,
        "num_history_iterations": 0,
        "resume": "auto",
    }
    torch.set_num_threads(1)
    trainer = SPINTrainer(
        model,
        SPINConfig(**{**settings, **config}),
        train_dataset=Dataset.from_list(read_rows("accent_train.jsonl", num_rows)),
        eval_dataset=Dataset.from_list(read_rows("accent_test.jsonl", 8)),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
        callbacks=[AtStep(fail_at)],
    )
    print(trainer.args, trainer.args.to_json_string(), trainer.plan, vars(trainer.plan.choice))
    trainer.train()
    if push:
        trainer.push_to_hub()
    return trainer


def play_in_process(cwd: Path, environment: dict[str, str], succeeds: bool = True, **job) -> str:
    """Play a job of `play`'s, which is to succeed or not, and give what it printed."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(job)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == succeeds, output
    return output


if __name__ == "__main__":
    play(**json.loads(sys.argv[1]))
