"""SIGTERM, as a cluster sends it before it takes a machine away, becomes a checkpoint and a clean end.

Knows nothing of iterations. Within training the current step is finished and a checkpoint saved; elsewhere everything
that is finished lies on disk already, so the run ends at once.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy


EXIT_STATUS = 128 + signal.SIGTERM


class StopOnSigterm(TrainerCallback):
    """A callback that ends training at the next step after SIGTERM, on all processes at the same one."""

    def __init__(self):
        self.is_requested = False
        self.has_stopped = False
        self._is_training = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM in hand. Only the main thread can; in another one nothing changes."""
        self.is_requested = self.has_stopped = self._is_training = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        earlier = signal.signal(signal.SIGTERM, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, earlier)

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Nothing is lost here by ending at once."""
        self._is_training = False
        self._end_if_requested()
        yield
        self._end_if_requested()  # Python drops what is raised within a destructor, where a signal may arrive
        self._is_training = True

    def _on_signal(self, *_) -> None:
        is_second, self.is_requested = self.is_requested, True
        if is_second or not self._is_training:
            self._end_if_requested()

    def _end_if_requested(self) -> None:
        if self.is_requested:
            raise SystemExit(EXIT_STATUS)

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
