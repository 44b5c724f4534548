"""A short run that counts what it does, and ends itself with SIGKILL at a given count. See test_kill_and_resume.py.

Everything that a kill could fall between counts: a forward pass, a file about to be written, flushed, renamed or
deleted, a step's beginning and end. On one process a run repeats exactly, so a count is a place in it.
"""

import json
import os
import shutil
import signal
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaForCausalLM, TrainerCallback

from spin_trl import SPINConfig, SPINTrainer
from spin_trl.generation.opening import SamplerHost
from spin_trl.generation.vllm.managed_server import ManagedServer
from spin_trl.play.records import Records
from spin_trl.policy.policy import Policy


FINAL_WEIGHTS = "final.safetensors"
PLACES = "places.json"


class KillAt:
    """
    Counts, remembers in which phase, and ends the process at a given count.

    Args:
        count (`int`, *optional*): Where to end; by default never.
    """

    def __init__(self, count: int | None):
        self.count = count
        self.places: list[str] = []
        self.phase = "start"

    def here(self) -> None:
        if len(self.places) == self.count:
            os.kill(os.getpid(), signal.SIGKILL)
        self.places.append(self.phase)

    @contextmanager
    def within(self, phase: str):
        earlier, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = earlier

    def judge(self, completions: list[str], **kwargs) -> list[float]:
        """A reward function: no two texts are equally good."""
        with self.within("rewards"):
            self.here()
        return [zlib.crc32(text.encode()) / 2**32 for text in completions]

    def before(self, function: Callable) -> Callable:
        """`function`, with a count before it."""

        def counted(*args, **kwargs):
            self.here()
            return function(*args, **kwargs)

        return counted


def as_preferences(rows: list[dict]) -> Dataset:
    columns = {"prompt": [row["prompt"] for row in rows], "chosen": [row["completion"] for row in rows]}
    return Dataset.from_dict({**columns, "rejected": ["AH0"] * len(rows)})


class CountSteps(TrainerCallback):
    def __init__(self, kill: KillAt):
        self.kill = kill

    def on_step_begin(self, *args, **kwargs):
        self.kill.here()

    def on_step_end(self, *args, **kwargs):
        self.kill.here()

    def on_epoch_end(self, *args, **kwargs):
        with self.kill.within("between iterations"):
            self.kill.here()

    def on_save(self, *args, **kwargs):
        with self.kill.within("between iterations"):
            self.kill.here()


def instrument(kill: KillAt) -> None:
    """Count wherever the state on disk or in memory changes. The process is this run's alone."""
    os.fsync = kill.before(os.fsync)
    Path.rename = kill.before(Path.rename)
    shutil.rmtree = kill.before(shutil.rmtree)
    torch.save = kill.before(torch.save)
    LlamaForCausalLM.forward = kill.before(LlamaForCausalLM.forward)
    ManagedServer._is_ready = kill.before(ManagedServer._is_ready)
    phase_of, open_sampler = Records.phase, SamplerHost.open
    save_checkpoint, save_opponent = SPINTrainer._save_checkpoint, Policy.save

    @contextmanager
    def phase(self, name, iteration):
        with kill.within(name), phase_of(self, name, iteration):
            yield

    def saving(self, *args):
        with kill.within("checkpoint"):
            save_checkpoint(self, *args)

    def saving_opponent(self, *args):
        with kill.within("opponent"):
            kill.here()
            save_opponent(self, *args)
            kill.here()

    def opening(self, *args):
        with kill.within("server start"):
            kill.here()
            open_sampler(self, *args)

    Records.phase, SamplerHost.open = phase, opening
    SPINTrainer._save_checkpoint, Policy.save = saving, saving_opponent


def play(model: str, rows: list[dict], output_dir: str, kill_at: int | None, settings: dict) -> None:
    """Play the run, or what is left of it, and leave the final weights and the phase of every count."""
    torch.set_num_threads(1)
    kill = KillAt(kill_at)
    instrument(kill)
    config = SPINConfig(output_dir=output_dir, **{**SETTINGS, **settings})
    has_rewards = config.pairing != "ground_truth"  # then some preferences, too
    trainer = SPINTrainer(
        model,
        config,
        train_dataset=Dataset.from_list(rows[:24]),
        eval_dataset=Dataset.from_list(rows[24:32]),
        reward_funcs=kill.judge if has_rewards else None,
        preference_dataset=as_preferences(rows[24:28]) if has_rewards else None,
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2),
        callbacks=[CountSteps(kill)],
    )
    with kill.within("train"):
        trainer.train()
    weights = {name: p.detach().contiguous() for name, p in trainer.model.named_parameters() if p.requires_grad}
    safetensors.torch.save_file(weights, Path(output_dir, FINAL_WEIGHTS))
    Path(output_dir, PLACES).write_text(json.dumps(kill.places))


# Greedy, so that a completion does not depend on what it was batched with. With dropout, so that random state counts.
SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "resume": "auto",
    "save_steps": 2,
    "num_iterations": 3,
    "epochs_per_iteration": 2,
    "learning_rate": [1e-2, 5e-3, 5e-3],
    "warmup_steps": 0.25,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "disable_dropout": False,
    "max_completion_length": 12,
    "temperature": 0.0,
    "identical_pairs": "keep",
    "generation_part_size": 6,
    "per_device_generation_batch_size": 3,
}
