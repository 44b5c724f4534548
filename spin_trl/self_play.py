"""`SelfPlayCallback`: the outer loop. It calls the game between epochs, and knows nothing of what an iteration does."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState

from .data.pair_dataset import PairDataset
from .play.game import Game
from .processes.random_state import preserved_random_state
from .processes.stop_signal import StopOnSignal
from .run_directory.run import RunEnd
from .spin_config import SPINConfig


@dataclass(eq=False)
class SelfPlayCallback(TrainerCallback):
    """
    A callback that plays the policy against its own previous iterate.

    Before the first epoch of every iteration it has the pairs made that the policy is to be trained on. At the end of
    the run the final policy is evaluated as one more opponent, if there is an evaluation dataset.

    `begin_iteration` has the trainer train on an iteration's pairs.
    """

    game: Game
    stop_signal: StopOnSignal
    begin_iteration: Callable[[int, PairDataset], None]

    def __post_init__(self):
        self.run, self.records = self.game.run, self.game.records

    def on_epoch_begin(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        iteration = int(state.epoch + 1e-6) // args.epochs_per_iteration
        if iteration == self.run.iteration:
            return
        with self._between_steps(), preserved_random_state():
            pairs = self.game.play(iteration)
            self.records.log_kept(iteration)
            self.begin_iteration(iteration, pairs)
            self.records.begin_training(iteration)
        if self.run.end is not None:
            control.should_training_stop = True

    def on_step_end(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        if state.global_step >= self.run.place.last_step:
            self.records.end_training(self.run.iteration)

    def on_save(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        self.records.keep_training_seconds(self.run.iteration)

    def on_train_end(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        if self.stop_signal.has_stopped:
            return
        self.records.end_training(self.run.iteration)
        if self.run.start.is_finished:
            return
        if self.run.end is None:
            with self._between_steps():
                self.game.judge_final_policy(self.run.next_opponent)
        self.records.log_kept(self.run.next_opponent)

    @contextmanager
    def _between_steps(self) -> Iterator[None]:
        """Where the run may end early: the policy, which is the newest opponent, is then what training has come to."""
        try:
            with self.stop_signal.between_steps():
                yield
        except RunEnd as end:
            self.run.end = end
            self.records.log_kept(end.iteration)
            PartialState().print(str(end))
