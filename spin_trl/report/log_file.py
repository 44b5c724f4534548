"""`log.jsonl`: what was logged, one entry a line, as the run goes. Checkpoints have it at iterations' ends only."""

import json

from transformers import TrainerCallback, TrainerControl, TrainerState

from ..run_directory.disk import writing
from ..run_directory.run import Run
from ..run_directory.store import IterationStore
from ..run_directory.whole_files import write_text
from ..spin_config import SPINConfig


class LogFileCallback(TrainerCallback):
    """
    A callback that keeps the Trainer's log on disk.

    A run that goes on begins with the log of its checkpoint: what was logged after that, by steps that are taken again,
    goes, and so does a line that a kill cut short.

    Args:
        run ([`Run`]): Knows whether anything is left to do.
        store ([`IterationStore`]): The run directory.
    """

    def __init__(self, run: Run, store: IterationStore):
        self.run = run
        self.store = store

    def on_train_begin(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        if self._writes(state):
            write_text(self.store.log_file, "".join(map(_line, state.log_history)))

    def on_log(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        if self._writes(state) and state.log_history:
            with writing(self.store.log_file), self.store.log_file.open("a") as file:
                file.write(_line(state.log_history[-1]))

    def _writes(self, state: TrainerState) -> bool:
        return state.is_world_process_zero and not self.run.start.is_finished


def _line(entry: dict) -> str:
    return json.dumps(entry, default=float) + "\n"
