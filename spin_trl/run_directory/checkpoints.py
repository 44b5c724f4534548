"""A checkpoint's place in its run, written into it last of all: the mark of a whole one. Knows nothing of training."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, rotate_checkpoints

from ..processes.ranks import on_every_process
from .disk import writing
from .whole_files import flush, write_json


PLACE_FILE = "self_play.json"


@dataclass(frozen=True)
class Place:
    """
    How far a run has come; in a checkpoint's directory, that checkpoint's place. Steps are optimizer steps.

    Args:
        step (`int`): Steps of the run.
        iteration (`int`): Number of the iteration.
        first_step (`int`): Steps of the run before the iteration.
        steps_per_epoch (`int`): Steps in each of the iteration's epochs.
        num_epochs (`int`): Epochs in the iteration.
        pairs (`str`, *optional*): Checksum of the iteration's pairs.
        holds_optimizer (`bool`): Whether training can go on in the middle of the iteration.
    """

    run_id: str
    step: int = 0
    iteration: int = 0
    first_step: int = 0
    steps_per_epoch: int = 1
    num_epochs: int = 1
    pairs: str | None = None
    holds_optimizer: bool = True

    @property
    def num_steps(self) -> int:
        """Steps of the iteration that are done."""
        return self.step - self.first_step

    @property
    def last_step(self) -> int:
        """Steps of the run when the iteration is done."""
        return self.first_step + self.steps_per_epoch * self.num_epochs

    @property
    def is_iteration_done(self) -> bool:
        return self.step >= self.last_step

    @property
    def epochs(self) -> tuple[int, int]:
        """Epochs of the run that are done, and steps of the next one that are."""
        num_epochs, num_steps = divmod(self.num_steps, self.steps_per_epoch)
        return self.iteration * self.num_epochs + num_epochs, num_steps

    @classmethod
    def read(cls, checkpoint: Path) -> "Place":
        """
        Raises:
            `OSError`, `ValueError`, `TypeError`: if there is none, or it is not one.
        """
        return cls(**json.loads((checkpoint / PLACE_FILE).read_text()))


class MarkCheckpoint(TrainerCallback):
    """
    Marks each checkpoint as whole once every process has written its part, and only then deletes older ones. Sees to it
    that every iteration ends in one: the policy there is the next opponent, and a stopped run must have it back.

    Args:
        place (`Callable[[], Place]`): Gives the present place in the run.
        save_total_limit (`int`, *optional*): How many checkpoints are kept.
    """

    def __init__(self, place: Callable[[], Place], save_total_limit: int | None = None):
        self._place = place
        self._save_total_limit = save_total_limit
        self._marked_step: int | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._marked_step = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        on_every_process(lambda: None)  # here every process has written its part
        on_every_process(lambda: self._mark(args, _checkpoint(args, state)))
        self._marked_step = state.global_step

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        is_saved = args.save_strategy == SaveStrategy.NO or self._marked_step == state.global_step
        control.should_save = control.should_save or (not is_saved and self._place().is_iteration_done)

    def _mark(self, args: TrainingArguments, checkpoint: Path) -> None:
        if args.should_save:
            with writing(checkpoint):
                flush(checkpoint)
            write_json(checkpoint / PLACE_FILE, asdict(self._place()))
            rotate_checkpoints(args.output_dir, self._save_total_limit, use_mtime=True)


@contextmanager
def saving_checkpoints(args: TrainingArguments, state: TrainerState) -> Iterator[None]:
    """
    Around training steps, while Trainer saves checkpoints and [`MarkCheckpoint`] marks them.

    Raises:
        [`DiskError`]: in place of a library's own error, if the disk does not take a checkpoint.
    """
    # Trainer would delete older checkpoints before the new one is marked: `MarkCheckpoint` does it in its place.
    limit, args.save_total_limit = args.save_total_limit, None
    try:
        yield
    except Exception:
        checkpoint = _checkpoint(args, state)
        if not checkpoint.is_dir() or (checkpoint / PLACE_FILE).exists():  # then it came from somewhere else
            raise
        with writing(checkpoint):
            raise
    finally:
        args.save_total_limit = limit


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
