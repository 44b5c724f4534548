"""SIGTERM, as a cluster sends it before it takes a machine away, and Ctrl-C become a checkpoint and a clean end.

Knows nothing of iterations. Within training the current step is finished and a checkpoint saved; elsewhere everything
that is finished lies on disk already, so the run ends at once.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy


EXIT_STATUS = 128 + signal.SIGTERM
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ONE_SIGNAL = 1.0  # seconds


class StopOnSignal(TrainerCallback):
    """A callback that ends training at the next step after SIGTERM or SIGINT, on all processes at the same one."""

    def __init__(self):
        self.is_requested = self.is_interrupt = False
        self.has_stopped = False
        self._is_training = False
        self._requested_at = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals in hand. Only the main thread can; in another one nothing changes."""
        self.is_requested = self.is_interrupt = self.has_stopped = self._is_training = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        earlier = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Nothing is lost here by ending at once."""
        self._is_training = False
        self.end_if_requested()
        yield
        self.end_if_requested()  # Python drops what is raised within a destructor, where a signal may arrive
        self._is_training = True

    def _on_signal(self, number: int, _) -> None:
        if self.is_requested and time.monotonic() < self._requested_at + _ONE_SIGNAL:
            return  # a launcher passes on what the terminal has sent to all
        waits_for_step = self._is_training and not self.is_requested
        self.is_requested, self.is_interrupt, self._requested_at = True, number == signal.SIGINT, time.monotonic()
        if not waits_for_step:
            self.end_if_requested()

    def end_if_requested(self) -> None:
        """Raise what the signal means to Python."""
        if self.is_requested or self.has_stopped:  # the second where another process heard it
            raise KeyboardInterrupt if self.is_interrupt else SystemExit(EXIT_STATUS)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self._all_agree(args):
            self.has_stopped = True
            control.should_save = args.save_strategy != SaveStrategy.NO
            control.should_training_stop = True

    def _all_agree(self, args: TrainingArguments) -> bool:
        """Whether any process was told to end. Signals do not arrive everywhere within the same step."""
        if args.world_size == 1:
            return self.is_requested
        return bool(reduce(torch.tensor(float(self.is_requested), device=args.device)) > 0)
