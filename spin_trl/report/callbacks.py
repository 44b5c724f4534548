"""What shows a run as it goes: its log on disk, answers as a table, revisions on the hub."""

import json

from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState

from ..run_directory.disk import writing
from ..run_directory.run import Run
from ..run_directory.store import IterationStore
from ..run_directory.whole_files import write_text
from ..spin_config import SPINConfig
from .completion_table import ShowCompletions
from .hub import PushIterations


def callbacks_of(
    args: SPINConfig, run: Run, store: IterationStore, tokenizer: PreTrainedTokenizerBase, hub_model_id: str | None
) -> list[TrainerCallback]:
    """Those that the settings ask for."""
    callbacks: list[TrainerCallback] = [LogFileCallback(run, store)]
    if args.hub_iteration_revisions:
        callbacks.append(PushIterations(store, hub_model_id))
    if args.log_completions:
        callbacks.append(ShowCompletions(store, tokenizer))
    return callbacks


class LogFileCallback(TrainerCallback):
    """
    A callback that keeps the Trainer's log in `log.jsonl`, one entry a line. Checkpoints have it at iterations' ends
    only.

    A run that goes on begins with the log of its checkpoint: what was logged after that, by steps that are taken again,
    goes, and so does a line that a kill cut short.
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
