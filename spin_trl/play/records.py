"""`Records`: an iteration's numbers, kept in its `metrics.json`, handed to the loggers once, and shown as a table.

Knows nothing of what the numbers mean.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from ..evaluation.held_out import ScoreTable
from ..evaluation.metric_names import EVALUATION, ITERATION, label, logged_values
from ..processes.progress import begin_phase
from ..processes.ranks import on_main_process
from ..run_directory.run import RunStart
from ..run_directory.store import IterationStore


@dataclass
class Records:
    """
    What was logged travels with the checkpoints, in `state.log_history`. So a resumed run knows which values its
    loggers have had, and takes the others from the disk: none is logged twice or lost.

    Every process calls the methods together. `log_values` hands values to the loggers.
    """

    store: IterationStore
    log_values: Callable[[dict[str, float]], None]
    log_history: Callable[[], list[dict]]
    _table: ScoreTable = field(default_factory=ScoreTable)
    _training_since: float | None = None

    def begin(self, start: RunStart) -> None:
        """Start the table, with the rows of a resumed run that it does not compute again."""
        self._table = ScoreTable(tqdm.write)  # beside a progress bar a plain print would tear it
        self._training_since = None
        if start.is_resumed:
            on_main_process(lambda: self._show_earlier(start))

    def record(self, iteration: int, metrics: dict[str, Any]) -> None:
        """Keep numbers in the iteration's `metrics.json`."""
        on_main_process(lambda: self.store.write_metrics(iteration, metrics))

    def record_evaluation(self, iteration: int, scores: dict[str, float]) -> None:
        """Keep, show and log what the opponent of `iteration` is worth."""
        self.record(iteration, {EVALUATION: scores})
        on_main_process(lambda: self._table.add(label(iteration), scores))
        self.log(iteration, {f"eval_{name}": value for name, value in scores.items()})

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """Log those of the values that have not been logged for this iteration."""
        entries = [entry for entry in self.log_history() if entry.get(ITERATION) == iteration]
        known = {name for entry in entries for name in entry}
        new = {name: value for name, value in values.items() if name not in known}
        if new:
            self.log_values({ITERATION: iteration, **new})

    def log_kept(self, iteration: int) -> None:
        """Log what is kept and has not been logged: of this iteration, and of earlier ones where a run stopped."""
        for number in range(iteration + 1):
            metrics = on_main_process(lambda number=number: self.store.read_metrics(number))
            if number == iteration:
                metrics.pop("seconds_train", None)  # there may be those of an earlier start
            self.log(number, logged_values(metrics))

    @contextmanager
    def phase(self, name: str, iteration: int) -> Iterator[None]:
        """Show a phase of an iteration, and keep the seconds that it takes."""
        begin_phase(name, iteration)
        started = time.monotonic()
        yield
        self._add_seconds(name, iteration, started)

    def begin_training(self, iteration: int) -> None:
        """The iteration's first step comes next."""
        begin_phase("train", iteration)
        self._training_since = time.monotonic()

    def keep_training_seconds(self, iteration: int) -> None:
        """A run that goes on from here has these seconds behind it."""
        if self._training_since is not None:
            self._add_seconds("train", iteration, self._training_since)
            self._training_since = time.monotonic()

    def end_training(self, iteration: int) -> None:
        """The last step of the iteration, or of the run, has been taken."""
        if self._training_since is not None:
            self.keep_training_seconds(iteration)
            self._training_since = None
            self.log(iteration, logged_values(on_main_process(lambda: self.store.read_metrics(iteration))))

    def _add_seconds(self, phase: str, iteration: int, started: float) -> None:
        name = f"seconds_{phase}"
        earlier = self.store.read_metrics(iteration).get(name, 0.0)  # of a run that was stopped in this phase, or later
        self.record(iteration, {name: earlier + time.monotonic() - started})

    def _show_earlier(self, start: RunStart) -> None:
        for iteration, metrics in self.store.all_metrics():
            if EVALUATION in metrics and (self.store.has_pairs(iteration) or start.is_finished):
                self._table.add(label(iteration), metrics[EVALUATION])
