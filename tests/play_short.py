"""A short self-play run in a process of its own: `python play_short.py '{"model": ..., "config": {...}}'`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from conftest import TINY_RUN, read_rows
from datasets import Dataset
from peft import LoraConfig

from spin_trl import SPINConfig, SPINTrainer


SETTINGS = {**TINY_RUN, "report": True, "num_iterations": 2, "num_history_iterations": 0, "resume": "auto"}


def play(model: str, config: dict, lora: bool = True, push: bool = False) -> None:
    torch.set_num_threads(1)
    trainer = SPINTrainer(
        model,
        SPINConfig(**{**SETTINGS, **config}),
        train_dataset=Dataset.from_list(read_rows("accent_train.jsonl", 16)),
        eval_dataset=Dataset.from_list(read_rows("accent_test.jsonl", 8)),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
    )
    print(trainer.args, trainer.args.to_json_string(), trainer.plan, vars(trainer.plan.choice))
    trainer.train()
    if push:
        trainer.push_to_hub()


def play_in_process(cwd: Path, environment: dict[str, str], **job) -> str:
    """Play a job of `play`'s, and give what it printed."""
    command = [sys.executable, __file__, json.dumps(job)]
    settings = {"cwd": cwd, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, env={**os.environ, **environment}, **settings)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output


if __name__ == "__main__":
    play(**json.loads(sys.argv[1]))
