"""`IterationLog`: an iteration's numbers, kept in its `metrics.json` and handed to the trainer's loggers once.

Knows nothing of what the numbers mean.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..evaluation.metric_names import ITERATION, logged_values
from ..processes.ranks import on_main_process
from ..run_directory.store import IterationStore


if TYPE_CHECKING:
    from ..spin_trainer import SPINTrainer


class IterationLog:
    """
    What was logged travels with the checkpoints, in `state.log_history`. So a resumed run knows which values its
    loggers have had, and takes the others from the disk: none is logged twice or lost.

    Args:
        trainer ([`SPINTrainer`]): Logs.
        store ([`IterationStore`]): The run directory.
    """

    def __init__(self, trainer: "SPINTrainer", store: IterationStore):
        self.trainer = trainer
        self.store = store

    def record(self, iteration: int, metrics: dict[str, Any]) -> None:
        """Keep numbers in the iteration's `metrics.json`."""
        on_main_process(lambda: self.store.write_metrics(iteration, metrics))

    def log_recorded(self, iteration: int, without: tuple[str, ...] = ()) -> None:
        """Log what is kept of an iteration, except the names in `without`."""
        metrics = on_main_process(lambda: self.store.read_metrics(iteration))
        values = logged_values(metrics)
        self.log(iteration, {name: value for name, value in values.items() if name not in without})

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """Log those of the values that have not been logged for this iteration."""
        entries = [entry for entry in self.trainer.state.log_history if entry.get(ITERATION) == iteration]
        known = {name for entry in entries for name in entry}
        new = {name: value for name, value in values.items() if name not in known}
        if new:
            self.trainer.log_self_play({ITERATION: iteration, **new})
