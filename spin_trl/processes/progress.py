"""What a run shows of itself: transformers' bar with iteration and phase, or, without a terminal, lines now and then.

Only the first process shows anything. Parts of a phase report through `progress_bar`; they know nothing of the run.
"""

import os
import sys
import time
from typing import TextIO

from tqdm import tqdm
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments


_NUMBERS = "{n_fmt}/{total_fmt}{unit}, {rate_noinv_fmt}{postfix}"

_nowhere = open(os.devnull, "w")
_shown: "RunProgress | None" = None  # the run that this process shows now, if any


def begin_phase(phase: str, iteration: int) -> None:
    """What the run does from now on."""
    if _shown is not None:
        _shown.begin(phase, iteration)


def progress_bar(*args, **kwargs) -> tqdm:
    """
    A bar for a part of a phase, which leaves no line behind: its numbers join the phase's line. The arguments are
    `tqdm`'s.
    """
    return _PartBar(*args, **{"unit": " batches", **kwargs}, leave=False, dynamic_ncols=True, file=_output())


class RunProgress(ProgressCallback):
    """
    [`~transformers.ProgressCallback`] for a run of several iterations. Its bar names iteration and phase, and its time
    left counts all phases, as their time so far goes into the time of a step. Without a terminal each phase is a line,
    a long one a line every minute, and the logs are not printed.

    Args:
        num_iterations (`int`): Iterations of the run.
        seconds_between_lines (`float`): Least time between two lines of a phase.
    """

    def __init__(self, num_iterations: int, seconds_between_lines: float = 60.0):
        super().__init__()
        self.num_iterations = num_iterations
        self.seconds_between_lines = seconds_between_lines
        self.phase, self.started, self.told = "", 0.0, 0.0
        self.parts: list[str] = []  # numbers of those of the phase that are done

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        global _shown
        if _shown is not None:  # a run that failed
            _shown.training_bar.close()
        _shown, self.current_step = None, state.global_step
        if state.is_world_process_zero:
            options = {"smoothing": 0, "unit": " steps", "dynamic_ncols": True, "file": _output()}
            self.state = state
            self.training_bar = tqdm(total=state.max_steps, initial=state.global_step, **options)
            _shown = self

    def begin(self, phase: str, iteration: int) -> None:
        self._end_phase()
        place = f"Iteration {iteration} ({iteration + 1} of {self.num_iterations})"
        if iteration == self.num_iterations:
            place = f"After iteration {iteration - 1}"
        self.phase, self.started = f"{place}: {phase}", time.monotonic()
        self.told = self.started
        self.training_bar.total = self.state.max_steps  # which an iteration's pairs have corrected
        self.training_bar.set_postfix_str("", refresh=False)
        self.training_bar.set_description(self.phase)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs):
        if sys.stderr.isatty():
            super().on_log(args, state, control, logs, **kwargs)
        elif self.training_bar is not None and "loss" in logs:
            accuracy = f", accuracy {logs['rewards/accuracies']:.0%}" if "rewards/accuracies" in logs else ""
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.4g}{accuracy}", refresh=False)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.tell(self.training_bar)

    def tell(self, bar: tqdm) -> None:
        """Without a terminal a line, if the last one is long ago."""
        if self.phase and not sys.stderr.isatty() and time.monotonic() >= self.told + self.seconds_between_lines:
            self.told = time.monotonic()
            print(f"{self.phase}: {_format(bar, _NUMBERS + ', {remaining} left')}", file=sys.stderr)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        global _shown
        if _shown is self:
            self._end_phase()
            super().on_train_end(args, state, control, **kwargs)
            _shown = None

    def _end_phase(self) -> None:
        if self.phase and not sys.stderr.isatty():
            seconds = tqdm.format_interval(time.monotonic() - self.started)
            steps = _NUMBERS if self.phase.endswith("train") else "{n_fmt}/{total_fmt}{unit}"
            numbers = ", ".join([*self.parts, _format(self.training_bar, steps + ", {remaining} left")])
            print(f"{self.phase} done in {seconds}, {numbers}", file=sys.stderr)
        self.phase, self.parts = "", []


class _PartBar(tqdm):
    def display(self, *args, **kwargs) -> bool:
        if _shown is not None:
            _shown.tell(self)
        return super().display(*args, **kwargs)

    def close(self) -> None:
        if not self.disable and self.n and _shown is not None:
            _shown.parts.append(_format(self, _NUMBERS))
        super().close()


def _output() -> TextIO:
    """Where bars go: to a terminal only, since elsewhere each update would be a line."""
    return sys.stderr if sys.stderr.isatty() else _nowhere


def _format(bar: tqdm, form: str) -> str:
    return " ".join(tqdm.format_meter(**{**bar.format_dict, "bar_format": form, "ncols": None}).split())
