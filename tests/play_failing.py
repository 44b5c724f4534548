"""A short run on two processes in which process 1 fails, for test_failing_runs.py to launch.

play_failing.py MODEL OUTPUT_DIR PHASES [--any_field value]

PHASES are some of generate, score, save and step, with commas between. Process 1 fails in the first; both catch its
error and begin again, and fail in the next one. The error of the last is not caught. With the phase wait nobody fails:
the main process writes `pids` while it evaluates, and sleeps.
"""

import os
import sys
import time
from pathlib import Path

import torch
from accelerate.utils import gather_object
from conftest import read_rows
from datasets import Dataset
from play_distributed import settings
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import TrlParser

from spin_trl import SPINConfig, SPINTrainer
from spin_trl.run_directory.whole_files import write_json


class InjectedError(ArithmeticError):
    pass


class Failing(TrainerCallback):
    def __init__(self, config: SPINConfig):
        self.phase, self.rank, self.folder = "", config.process_index, Path(config.output_dir)
        self.num_passes = 0

    def before_forward(self, model, args, kwargs) -> None:
        phase = "step" if torch.is_grad_enabled() else "generate" if kwargs.get("use_cache") else "score"
        if phase != self.phase:
            return
        self.num_passes += 1
        if self.num_passes == 3:
            self.fail()
        if phase == "generate":
            time.sleep(0.5)  # process 0 is in its midst

    def on_save(self, *args, **kwargs) -> None:
        if self.phase == "save":
            self.fail()

    def fail(self) -> None:
        if self.rank == 1:
            (self.folder / "failed-at").write_text(str(time.time()))
            raise InjectedError(f"injected into {self.phase}")


def wait(output_dir: str, pids: list[int]):
    def measure(prompts, truths, answers) -> dict[str, float]:
        write_json(Path(output_dir, "pids"), pids)
        time.sleep(500)

    return measure


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, output_dir, phases = sys.argv[1:4]
    parser = TrlParser(SPINConfig)
    overrides = {"num_iterations": 1, "learning_rate": 1e-3, "beta": 0.1, "per_device_train_batch_size": 4}
    overrides["precompute_ref_batch_size"] = 2  # several passes for each process, whatever the lengths
    parser.set_defaults_with_config(**settings(output_dir, **overrides, overwrite_output_dir=True))
    (config,) = parser.parse_args_and_config(sys.argv[4:])
    failing = Failing(config)
    policy = AutoModelForCausalLM.from_pretrained(model)
    policy.register_forward_pre_hook(failing.before_forward, with_kwargs=True)
    rows = read_rows("accent_train.jsonl", 40)
    pids = gather_object([os.getpid()])
    trainer = SPINTrainer(
        policy,
        config,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:16]) if phases == "wait" else None,
        compute_generation_metrics=wait(output_dir, pids) if phases == "wait" else None,
        callbacks=[failing],
    )
    *caught, last = phases.split(",")
    for failing.phase in caught:
        try:
            trainer.train()
        except InjectedError as error:
            seconds = time.time() - float(Path(output_dir, "failed-at").read_text())
            num_whole = len(trainer.store.checkpoints())
            print(f"Caught after {seconds:.1f} s: {error}, {num_whole} whole checkpoints", flush=True)
    failing.phase, failing.num_passes = last, 0
    trainer.train()
