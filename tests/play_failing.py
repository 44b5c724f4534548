"""A short run on two processes in which one fails in a given phase; started by test_failing_runs.py.

python tests/play_failing.py MODEL OUTPUT_DIR PHASE [--any_field value]

PHASE is one of those in `inject`. With `--wait` behind it nobody fails, and sampling is slow. With `--again` the error
is caught and the run begun again.
"""

import os
import sys
import time
from pathlib import Path

import torch
from conftest import read_rows
from datasets import Dataset
from play_distributed import settings
from transformers import TrainerCallback
from trl import TrlParser

from spin_trl import SPINConfig, SPINTrainer


class InjectedError(ArithmeticError):
    pass


def fail(trainer: SPINTrainer) -> None:
    """On process 1, once. The other one is where it happens to be."""
    failed = Path(trainer.args.output_dir, "failed-at")
    if trainer.args.process_index == 1 and not failed.exists():
        failed.write_text(str(time.time()))
        raise InjectedError("injected into process 1")


class FailAtStep(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            fail(self.trainer)


def inject(trainer: SPINTrainer, phase: str) -> None:
    def failing(method):
        def fail_first(*args, **kwargs):
            fail(trainer)
            return method(*args, **kwargs)

        return fail_first

    if phase == "publish":
        trainer.sampler.select = failing(trainer.sampler.select)
    elif phase in ("evaluate", "generate"):
        trainer.sampler.sample = sample_slowly(trainer, trainer.sampler.sample, greedy=phase == "evaluate")
    elif phase == "score":
        trainer.compute_ref_log_probs = failing(trainer.compute_ref_log_probs)
    elif phase == "step":
        callback = FailAtStep()
        callback.trainer = trainer
        trainer.add_callback(callback)
    elif phase == "save":
        trainer._save_checkpoint = failing(trainer._save_checkpoint)


def sample_slowly(trainer: SPINTrainer, sample, greedy: bool):
    """After the first answer process 1 fails, and process 0 goes on, half a second an answer."""

    def slowly(requests, params, *args, **kwargs):
        for completion in sample(requests, params, *args, **kwargs):
            yield completion
            if greedy == (params.temperature == 0):
                Path(trainer.args.output_dir, f"sampling-{trainer.args.process_index}").write_text(str(os.getpid()))
                if "--wait" not in trainer.phase:
                    fail(trainer)
                time.sleep(0.5)

    return slowly


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, output_dir, phase = sys.argv[1:4]
    parser = TrlParser(SPINConfig)
    overrides = {"num_iterations": 1, "learning_rate": 1e-3, "beta": 0.1, "per_device_train_batch_size": 4}
    overrides["temperature"] = 1.0  # tells generation from evaluation
    overrides |= {"save_strategy": "steps", "save_steps": 1, "overwrite_output_dir": True}
    parser.set_defaults_with_config(**settings(output_dir, **overrides))
    (config,) = parser.parse_args_and_config(sys.argv[4:])
    rows = read_rows("accent_train.jsonl", 40)
    trainer = SPINTrainer(
        model, config, train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows[:16])
    )
    trainer.phase = phase
    inject(trainer, phase.removesuffix("--wait").removesuffix("--again"))
    if phase.endswith("--again"):
        try:
            trainer.train()
        except InjectedError:
            trainer.sampler.sample = type(trainer.sampler).sample.__get__(trainer.sampler)
            trainer.train()
            Path(output_dir, f"trained-{config.process_index}").write_text(str(trainer.state.global_step))
    else:
        trainer.train()
