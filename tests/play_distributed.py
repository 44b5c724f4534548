"""Plays two short iterations and writes what every step saw; launched on several processes by test_distributed.py.

accelerate launch --config_file CONFIG tests/play_distributed.py MODEL DATA OUTPUT_DIR [--any_field value] [-- ...]

Behind each `--` stands another output directory with its fields, which is played next, by a trainer of its own. Fields
are those of `SPINConfig` and `Play`.
"""

import json
import os
import signal
import sys
from dataclasses import astuple, dataclass
from itertools import groupby
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from datasets import Dataset
from live_objects import count_live_objects
from peft import LoraConfig
from transformers import TrainerCallback
from trl import TrlParser

from spin_trl import SPINConfig, SPINTrainer


def let_fsdp_run_on_cpu() -> None:
    """Accelerate turns to FSDP where it has found several GPUs, and on CPUs silently trains with DDP instead."""
    PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_GPU)


def moments(optimizer) -> dict[str, float]:
    """Largest first moment and step number of an Adam, of what this process holds of it."""
    states = [state for state in optimizer.state.values() if state]
    tensors = [getattr(state["exp_avg"], "_local_tensor", state["exp_avg"]) for state in states]
    return {
        "moment": max((tensor.abs().max().item() for tensor in tensors if tensor.numel()), default=0.0),
        "adam_step": max((float(state["step"]) for state in states), default=0.0),
    }


class Record(TrainerCallback):
    """What every step saw; at the first one of iteration 1 the policy, which is its opponent, is saved besides."""

    def __init__(self):
        self.begins, self.ends, self.live = [], [], []
        self.trainer: SPINTrainer | None = None

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step == self.trainer.run.place.first_step:
            self.live.append(count_live_objects(self.trainer))
            if self.trainer.run.iteration == 1:
                self.trainer.policy.save(os.path.join(args.output_dir, "opponent"))
        self.begins.append({"rates": [group["lr"] for group in optimizer.param_groups], **moments(optimizer)})

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.ends.append(moments(optimizer))


@dataclass
class Play:
    """What is played: what is trained, and which process gets SIGTERM in which step."""

    adapter: str = "full"
    sigterm_to: int = -1
    sigterm_at: int = -1


class Terminate(TrainerCallback):
    """Sends this process SIGTERM within a step."""

    def __init__(self, step: int | None):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def settings(output_dir: str, **overrides) -> dict:
    """Four steps of eight pairs, then, with history, eight; the processes generate different numbers of batches."""
    return {
        "output_dir": output_dir,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "num_iterations": 2,
        "learning_rate": [1e-3, 2e-4],
        "beta": [0.1, 0.5],
        "warmup_steps": 0.25,
        "max_completion_length": 12,
        "identical_pairs": "keep",
        "temperature": 0.0,  # the same answers, whichever process gives them
        "use_vllm": False,
        "per_device_generation_batch_size": 2,
        **overrides,
    }


def shorter(completions: list[str], **kwargs) -> list[float]:
    """A reward function; only the main process is to call it."""
    assert PartialState().is_main_process
    return [-float(len(text.split())) for text in completions]


def as_preferences(rows: list[dict]) -> Dataset:
    """Each row's ground truth is preferred to the first one's."""
    columns = {"prompt": [row["prompt"] for row in rows], "chosen": [row["completion"] for row in rows]}
    return Dataset.from_dict({**columns, "rejected": ["AH0"] * len(rows)})


def play(model: str, data: str, config: SPINConfig, adapter: str = "full", sigterm_at: int | None = None) -> dict:
    record = Record()
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()[:39]]
    trainer = SPINTrainer(
        model,
        config,
        train_dataset=Dataset.from_list(rows[:30]),
        eval_dataset=None if config.metric_for_best_model is None else Dataset.from_list(rows[30:]),
        reward_funcs=None if config.pairing == "ground_truth" else shorter,
        preference_dataset=None if config.pairing == "ground_truth" else as_preferences(rows[:4]),
        callbacks=[record, Terminate(sigterm_at)],
        peft_config=LoraConfig(r=4, target_modules="all-linear") if adapter == "lora" else None,
    )
    record.trainer = trainer
    trainer.train()
    trainer.save_model(os.path.join(config.output_dir, "final"))
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "num_processes": config.world_size,
        "wrapper": type(trainer.model_wrapped).__name__,
        "sharding": [*astuple(trainer.plan.sharding)],
        "loss": [entry["loss"] for entry in steps],
        "learning_rate": [entry["learning_rate"] for entry in steps],
        "beta": trainer.beta,
        "begins": record.begins,
        "ends": record.ends,
        "live": record.live,
        "logged": [entry for entry in trainer.state.log_history if "self_play/iteration" in entry],
        "policy": {name: p.double().sum().item() for name, p in trainer.model.named_parameters()},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # the second process' "cpu:1" is none that `torch.load` can load to
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        let_fsdp_run_on_cpu()
    model, data, *arguments = sys.argv[1:]
    for is_between, words in groupby(arguments, "--".__eq__):
        if is_between:
            continue
        output_dir, *fields = words
        parser = TrlParser((Play, SPINConfig))
        parser.set_defaults_with_config(
            **settings(output_dir, per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", 1)))
        )
        options, config = parser.parse_args_and_config(fields)
        is_terminated = options.sigterm_to == config.process_index
        try:
            seen = play(model, data, config, options.adapter, options.sigterm_at if is_terminated else None)
        except SystemExit as end:  # after SIGTERM
            print(f"Would end with status {end.code}", flush=True)
        else:
            Path(output_dir, f"seen-{config.process_index}.json").write_text(json.dumps(seen))
    PartialState().destroy_process_group()  # without it gloo may abort a process that ends
