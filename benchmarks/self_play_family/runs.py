"""One run: a task's start, trained by one method with one setting and seed, and measured after each iteration."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import PreTrainedModel, TrainerCallback

from spin_trl import SPINConfig, SPINTrainer

from .measures import measure
from .methods import METHODS, Setting
from .supervised import COMMON_ARGUMENTS, fine_tune, load
from .task import Task
from .tasks import get_task


START = "start"  # in place of a method's name: the start is measured as it is
_MAX_COMPLETION_LENGTH = 20


@dataclass(frozen=True)
class Run:
    """
    Args:
        root (`Path`): Where starts and results are kept.
        task, method (`str`): Their names.
        setting (`Setting`): What differs from the method's other runs.
        seed (`int`): Of the order of the data and of the sampling.
        part (`str`): On which it is measured: `"validation"` or `"test"`.
        is_quick (`bool`): A trial, whose scores mean nothing.
    """

    root: Path
    task: str
    method: str
    setting: Setting
    seed: int
    part: str
    is_quick: bool = False

    @property
    def start(self) -> Path:
        return self.root / self.task / "start"

    @property
    def path(self) -> Path:
        """Of its result."""
        words = [f"{name}={value:g}" for name, value in self.setting.items()]
        return self.root / self.task / f"{'-'.join([self.method, *words, f'seed={self.seed}', self.part])}.json"

    def fingerprint(self) -> str:
        """Of all that a result depends on, but for the code: results of other data or another start are not used."""
        parts = [
            get_task(self.task, self.is_quick).describe(),
            METHODS[self.method].arguments if self.method != START else {},
            hashlib.sha256((self.start / "model.safetensors").read_bytes()).hexdigest(),
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def result(self) -> dict[str, Any] | None:
        """What was measured, if this run is over."""
        if not self.path.is_file():
            return None
        result = json.loads(self.path.read_text())
        return result if result["fingerprint"] == self.fingerprint() else None


@contextmanager
def alone_on_a_core(log: Path) -> Iterator[None]:
    """One thread, and all that is said goes to a file."""
    torch.set_num_threads(1)
    disable_progress_bars()
    _made(log.parent)
    with open(log, "w") as file, redirect_stdout(file), redirect_stderr(file):
        yield


def make_start(root: Path, name: str, is_quick: bool) -> str:
    """Train a task's start where there is none. Returns the task's name."""
    folder = root / name / "start"
    if not (folder / "model.safetensors").is_file():
        with TemporaryDirectory(dir=_made(root / name)) as temporary, alone_on_a_core(root / name / "start.log"):
            get_task(name, is_quick).make_start(Path(temporary) / "start", 2 if is_quick else None)
            (Path(temporary) / "start").rename(folder)
    return name


def scores_of(run: Run, task: Task) -> list[dict[str, float]]:
    """After each iteration; of the start, one."""
    rows = task.rows()
    model, tokenizer = load(run.start)

    def measured(model: PreTrainedModel) -> dict[str, float]:
        return measure(task, model, tokenizer, rows[run.part])

    if run.method == START:
        return [measured(model)]
    callback = MeasureEachIteration(measured, task.steps_per_iteration(len(rows["train"])))
    with TemporaryDirectory(dir=_made(run.root / run.task)) as folder:
        train = play if METHODS[run.method].is_self_play else train_further
        train(run, task, model, tokenizer, Path(folder) / "run", callback)
    if len(callback.scores) != task.num_iterations:
        raise RuntimeError(f"Measured {len(callback.scores)} times, but expected {task.num_iterations}: {run}")
    return callback.scores


class MeasureEachIteration(TrainerCallback):
    """Measures the model whenever as many steps have been taken as an iteration has, whatever the method."""

    def __init__(self, measured: Callable[[PreTrainedModel], dict[str, float]], steps_per_iteration: int):
        self.measured = measured
        self.steps_per_iteration = steps_per_iteration
        self.scores: list[dict[str, float]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.steps_per_iteration == 0:
            self.scores.append(self.measured(model))
            model.train()


def train_further(run: Run, task: Task, model, tokenizer, folder: Path, callback: MeasureEachIteration) -> None:
    """SFT on the ground truths, for as many steps of the same batch size as the self-play has, on one schedule."""
    fine_tune(
        model,
        tokenizer,
        task.rows()["train"],
        folder,
        [callback],
        **run.setting,
        seed=run.seed,
        per_device_train_batch_size=task.batch_size,
        max_steps=callback.steps_per_iteration * task.num_iterations,
    )


def play(run: Run, task: Task, model, tokenizer, folder: Path, callback: MeasureEachIteration) -> None:
    """Self-play, in which the policy itself answers in-process."""
    config = SPINConfig(
        output_dir=str(folder),
        **COMMON_ARGUMENTS,
        **METHODS[run.method].arguments,
        **run.setting,
        seed=run.seed,
        per_device_train_batch_size=task.batch_size,
        num_iterations=task.num_iterations,
        epochs_per_iteration=task.epochs_per_iteration,
        num_history_iterations=0,  # so that every iteration has as many steps
        identical_pairs="keep",  # the same
        use_vllm=False,
        per_device_generation_batch_size=256,
        max_completion_length=_MAX_COMPLETION_LENGTH,
        report=False,
    )
    trainer = SPINTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(task.rows()["train"]),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()


def perform(run: Run, scores_of: Callable[[Run, Task], list[dict[str, float]]] = scores_of) -> Run:
    """Train, measure, and write the result. A run whose loss stops being a number has no scores."""
    started = time.monotonic()
    result = {**asdict(run), "root": None, "fingerprint": run.fingerprint()}
    with alone_on_a_core(run.path.with_suffix(".log")):
        try:
            result["scores"] = scores_of(run, get_task(run.task, run.is_quick))
        except FloatingPointError as error:
            result |= {"scores": None, "error": str(error)}
    result["seconds"] = time.monotonic() - started
    unfinished = run.path.with_suffix(".partial")
    unfinished.write_text(json.dumps(result, indent=2) + "\n")
    unfinished.rename(run.path)
    return run


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
