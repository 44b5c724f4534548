"""A short run that counts what it does, and ends itself with SIGKILL at a given count. See test_kill_and_resume.py.

Everything that a kill could fall between counts: a forward pass, a file about to be written, flushed, renamed or
deleted, a step's beginning and end. On one process a run repeats exactly, so a count is a place in it.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from conftest import TINY_RUN
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaModel, TrainerCallback

from spin_trl import SPINConfig, SPINTrainer


PLACES = "places.json"


class KillAt:
    """
    Counts, remembers at which place, and ends the process.

    Args:
        output_dir (`str`): The run directory.
        kill_at (`int` or `str`, *optional*): The count at which to end, or the place, when first there; by default
            never.
    """

    def __init__(self, output_dir: str, kill_at: int | str | None):
        self.output_dir = Path(output_dir).absolute()
        self.kill_at = kill_at
        self.places: list[str] = []

    def here(self, place: str) -> None:
        if self.kill_at in (len(self.places), place):
            os.kill(os.getpid(), signal.SIGKILL)
        self.places.append(place)

    def judge(self, completions: list[str], **kwargs) -> list[float]:
        """A reward function: no two texts are equally good."""
        self.here("rewards")
        return [zlib.crc32(text.encode()) / 2**32 for text in completions]

    def before(self, function: Callable, place_of: Callable[..., str]) -> Callable:
        """`function`, with a count before it."""

        def counted(*args, **kwargs):
            self.here(place_of(*args))
            return function(*args, **kwargs)

        return counted

    def kind_of(self, path: str | Path) -> str:
        """What lies at a path, whatever its number: "checkpoint", "its mark", "pairs", "metrics"."""
        path = Path(path).absolute()
        if not path.is_relative_to(self.output_dir) or path == self.output_dir:
            return "elsewhere"
        names = [re.split(r"[-.]", name)[0] for name in path.relative_to(self.output_dir).parts]
        if names[0] == "checkpoint":
            return "mark" if names[-1] == "self_play" else "checkpoint"
        return names[min(1, len(names) - 1)] if names[0] == "iteration" else names[0]


class CountSteps(TrainerCallback):
    def __init__(self, kill: KillAt):
        for event in ("step_begin", "step_end", "epoch_end", "save"):
            setattr(self, f"on_{event}", kill.before(lambda *args, **kwargs: None, lambda *_, place=event: place))


def instrument(kill: KillAt) -> None:
    """Count wherever the state on disk or in memory changes. The process is this run's alone."""
    os.fsync = kill.before(os.fsync, lambda number, *_: kill.kind_of(os.readlink(f"/proc/self/fd/{number}")))
    Path.rename = kill.before(Path.rename, lambda _, target: kill.kind_of(target))
    shutil.rmtree = kill.before(shutil.rmtree, lambda path, *_: kill.kind_of(path))
    torch.save = kill.before(torch.save, lambda *_: "checkpoint")
    LlamaModel.forward = kill.before(
        LlamaModel.forward, lambda model, *_: "training" if model.training else "inference"
    )
    spawn = subprocess.Popen.__init__

    def spawned(*args, **kwargs):
        spawn(*args, **kwargs)
        kill.here("server start")

    subprocess.Popen.__init__ = spawned


def play(model: str, rows: list[dict], output_dir: str, kill_at: int | str | None, settings: dict) -> None:
    """Play the run, or what is left of it, and leave the place of every count."""
    torch.set_num_threads(1)
    kill = KillAt(output_dir, kill_at)
    instrument(kill)
    config = SPINConfig(output_dir=output_dir, **{**SETTINGS, **settings})
    has_rewards = config.pairing != "ground_truth"  # then some preferences, too
    preferences = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "AH0"} for row in rows[24:28]]
    trainer = SPINTrainer(
        model,
        config,
        train_dataset=Dataset.from_list(rows[:24]),
        eval_dataset=Dataset.from_list(rows[24:32]),
        reward_funcs=kill.judge if has_rewards else None,
        preference_dataset=Dataset.from_list(preferences) if has_rewards else None,
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2),
        callbacks=[CountSteps(kill)],
    )
    trainer.train()
    Path(output_dir, PLACES).write_text(json.dumps(kill.places))


# Greedy, so that a completion does not depend on what it was batched with. With dropout, so that random state counts.
SETTINGS = {
    **TINY_RUN,
    "resume": "auto",
    "save_strategy": "steps",
    "save_steps": 2,
    "num_iterations": 2,
    "epochs_per_iteration": 2,
    "learning_rate": [1e-2, 5e-3],
    "warmup_steps": 0.25,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "disable_dropout": False,
    "temperature": 0.0,
    "per_device_generation_batch_size": 2,
}
