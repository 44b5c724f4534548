"""What a run shows of itself: one bar that says iteration, phase and time left, or, without a terminal, a line a phase.

Only the first process shows anything. Parts of a phase report through `progress_bar`; they know nothing of the bar.
"""

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import datasets
from tqdm import tqdm
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging


_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_LOOKS = 0.2
_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps{postfix}"

_shown: "RunProgress | None" = None  # the run that this process shows now, if any


def progress_bar(*args, **kwargs) -> "tqdm | PhaseProgress":
    """
    Progress of a part of a phase: in the run's own bar where there is one, otherwise a `tqdm` bar that leaves no line
    behind. Without a terminal, where each update is a line, that one updates rarely. The arguments are `tqdm`'s.
    """
    if _shown is not None and "bar_format" not in kwargs:
        return PhaseProgress(_shown, *args, **kwargs)
    if not sys.stderr.isatty():
        kwargs.setdefault("mininterval", _SECONDS_BETWEEN_LINES)
        kwargs.setdefault("maxinterval", 10 * _SECONDS_BETWEEN_LINES)
    return tqdm(*args, leave=False, **kwargs)


def begin_phase(phase: str, iteration: int) -> None:
    """What the run does from now on."""
    if _shown is not None:
        _shown.begin(phase, iteration)


class PhaseProgress:
    """What `tqdm` is to a loop, for a part of a phase; it is shown in the run's bar."""

    def __init__(
        self, run: "RunProgress", iterable=None, total=None, unit: str = "", disable: bool = False, **others: Any
    ):
        self.run = run
        self.iterable = iterable
        self.total = len(iterable) if total is None and iterable is not None else total
        self.unit = unit.strip() or "batches"
        self.disable = disable
        self.n = 0
        self.remark = ""

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable:
            yield item
            self.update()
        self.close()

    def update(self, n: float = 1) -> None:
        self.n += n
        if not self.disable:
            self.run.show_part(self)

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        self.remark = text

    def close(self) -> None:
        if not self.disable:
            self.run.note(self)

    def __str__(self) -> str:
        remark = f", {self.remark}" if self.remark else ""
        return f"{self.n:.0f}/{self.total} {self.unit}{remark}"

    def __enter__(self) -> "PhaseProgress":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class TimeLeft:
    """
    How long a run still takes, from how long its phases took so far.

    Args:
        num_iterations (`int`): Iterations of the run.
        phases (`tuple[str, ...]`): Those of an iteration but for training, which is counted in steps.
    """

    def __init__(self, num_iterations: int, phases: tuple[str, ...]):
        self.num_iterations = num_iterations
        self.phases = phases
        self.seconds: dict[str, float] = {}  # of each phase, when it was last complete
        self.seconds_per_step: float | None = None

    def estimate(self, iteration: int, phase: str, seconds: float, share: float, steps_left: int) -> float | None:
        """
        Seconds left, or `None` as long as a phase that is still to come has never been seen.

        Args:
            iteration (`int`), phase (`str`): What the run does now.
            seconds (`float`): Since that phase began.
            share (`float`): How much of it is done.
            steps_left (`int`): Steps of the whole run that are not done.
        """
        known = dict(self.seconds)
        if phase in self.phases and share > 0:
            known[phase] = seconds / share
        later = self.phases[self.phases.index(phase) + 1 :] if phase in self.phases else ()
        to_come = [*later, *self.phases * (self.num_iterations - iteration - 1)]
        if "evaluate" in self.phases:  # the final policy too
            to_come.append("evaluate")
        if iteration >= self.num_iterations:
            to_come = []
        if self.seconds_per_step is None or any(name not in known for name in to_come):
            return None
        left = max(0.0, known[phase] - seconds) if phase in known and phase in self.phases else 0.0
        return left + sum(known[name] for name in to_come) + steps_left * self.seconds_per_step


class RunProgress(ProgressCallback):
    """
    Takes the place of [`~transformers.ProgressCallback`]. Its bar counts the steps of all iterations, and says which
    iteration and phase the run is in and how long it still takes.

    Args:
        num_iterations (`int`): Iterations of the run.
        evaluates (`bool`): Whether there is an evaluation in each of them, and one at the end.
    """

    def __init__(self, num_iterations: int, evaluates: bool):
        super().__init__()
        phases = ("publish", "evaluate", "generate", "score") if evaluates else ("publish", "generate", "score")
        self.num_iterations = num_iterations
        self.left = TimeLeft(num_iterations, phases)
        self.is_terminal = sys.stderr.isatty()
        self.iteration, self.phase, self.started = 0, "", 0.0
        self.parts: list[PhaseProgress] = []
        self.logs: dict[str, float] = {}
        self.first_step = self.step = 0
        self._looked = 0.0
        self._restore: list[Callable[[], None]] = []

    # What Trainer tells

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        global _shown
        self.current_step = self.step = state.global_step
        self._quieten_libraries()
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                dynamic_ncols=True,
                bar_format=_FORMAT,
                disable=not self.is_terminal,
            )
            _shown = self

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        self.step = state.global_step
        if self.training_bar is not None:
            self.left.seconds_per_step = self._seconds() / max(1, self.step - self.first_step)
            self._show(f"step {self.step - self.first_step}")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs):
        self.logs = {**self.logs, **logs} if self.phase == "train" else self.logs
        if self.is_terminal:
            super().on_log(args, state, control, logs, **kwargs)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.stop()

    def stop(self) -> None:
        """Take the bar away, also when the run fails."""
        global _shown
        while self._restore:
            self._restore.pop()()
        if self.training_bar is not None:
            self._end_phase()
            self.training_bar.close()
            self.training_bar, _shown = None, None

    def _quieten_libraries(self) -> None:
        """A second bar, of a dataset or a model being written, would be shown over this one."""
        if not datasets.are_progress_bars_disabled():
            datasets.disable_progress_bars()
            self._restore.append(datasets.enable_progress_bars)
        if transformers_logging.is_progress_bar_enabled():
            transformers_logging.disable_progress_bar()
            self._restore.append(transformers_logging.enable_progress_bar)

    # What the self-play tells

    def begin(self, phase: str, iteration: int) -> None:
        self._end_phase()
        self.phase, self.iteration, self.started = phase, iteration, time.monotonic()
        self.first_step, self.parts, self.logs = self.step, [], {}
        self._show("")
        self._looked = 0.0  # the first part is shown at once

    def show_part(self, part: PhaseProgress) -> None:
        share = part.n / part.total if part.total else 0.0
        self._show(str(part), share)

    def note(self, part: PhaseProgress) -> None:
        if part.n and part not in self.parts:
            self.parts.append(part)

    # What is shown

    def _end_phase(self) -> None:
        if self.phase:
            seconds = self._seconds()
            self.left.seconds[self.phase] = seconds
            if not self.is_terminal:
                tqdm.write(f"{self._place()} done in {_duration(seconds)}{self._numbers()}", file=sys.stderr)
            self.phase = ""

    def _numbers(self) -> str:
        numbers = [str(part) for part in self.parts]
        if self.phase == "train":
            numbers = [f"{self.step - self.first_step} steps (at {self.step}/{self.training_bar.total})"]
            for name in ("loss", "rewards/accuracies", "rewards/margins"):
                numbers += [f"{name} {self.logs[name]:.4g}"] if name in self.logs else []
        left = self._seconds_left(share=1.0)
        if left is not None and self.iteration < self.num_iterations:
            numbers.append(f"about {_duration(left)} left")
        return "".join(f", {text}" for text in numbers)

    def _show(self, part: str, share: float = 0.0) -> None:
        now = time.monotonic()
        if self.training_bar is None or not self.is_terminal or (part and now - self._looked < _SECONDS_BETWEEN_LOOKS):
            return
        self._looked = now
        left = self._seconds_left(share)
        words = [part, "? left" if left is None else f"{_duration(left)} left"]
        self.training_bar.set_description_str(self._place(), refresh=False)
        self.training_bar.set_postfix_str(", ".join(word for word in words if word), refresh=True)

    def _place(self) -> str:
        if self.iteration >= self.num_iterations:
            return f"After iteration {self.num_iterations - 1}: {self.phase}"
        return f"Iteration {self.iteration} ({self.iteration + 1} of {self.num_iterations}): {self.phase}"

    def _seconds(self) -> float:
        return time.monotonic() - self.started

    def _seconds_left(self, share: float) -> float | None:
        steps_left = self.training_bar.total - self.step
        return self.left.estimate(self.iteration, self.phase, self._seconds(), share, steps_left)


def _duration(seconds: float) -> str:
    return tqdm.format_interval(seconds) if seconds >= 60 else f"{seconds:.1f} s"
