"""The layout of a run directory (`docs/run_directory.md` shows it). Knows nothing of tensors and of HTTP.

Everything is written under a temporary name and renamed when it is whole: what carries its final name is complete.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets
from filelock import FileLock, Timeout

from ..data.columns import BATCH_SIZE, batches
from ..data.pair_dataset import TRUTH_COLUMNS, PairDataset
from .arrow_directory import ArrowDirectory
from .checkpoints import PLACE_FILE
from .completion_parts import CompletionParts
from .description import without_secrets
from .disk import writing
from .initial_answers import InitialAnswers
from .run_paths import RunDirectoryError, is_numbered, numbered, own_path
from .whole_files import is_temporary, make_directory, remove, temporary_path, write_json, write_text, write_whole


_DATA = ("train_data", "preference_data")
_FILES = ("self_play.json", "invalid_rows.jsonl", "log.jsonl", "report.html", "report", "merged", "served-base")


class IterationStore:
    """
    Where the files of one self-play run lie.

    Nothing is made before the first write. `run_id` is written into what the run makes, so that another run's files are
    known as such.
    """

    def __init__(self, output_dir: str | Path, run_id: str = ""):
        self.output_dir = Path(output_dir).absolute()
        self.run_id = run_id
        self._data: Dataset | None = None

    def path(self, iteration: int, *names: str) -> Path:
        """
        Path of an iteration's directory, or of something in it.

        Raises:
            [`RunDirectoryError`]: if a link leads out of the run directory on the way.
        """
        return own_path(self.output_dir, f"iteration-{iteration:d}", *names)

    @property
    def server_log(self) -> Path:
        return own_path(self.output_dir, "vllm-server.log")

    @property
    def served_base(self) -> Path:
        """The base model as a managed server is to have it, where that is not the one that was passed."""
        return own_path(self.output_dir, "served-base")

    @property
    def log_file(self) -> Path:
        return own_path(self.output_dir, "log.jsonl")

    def iterations(self) -> list[int]:
        """Numbers of the iterations that have been begun, ascending."""
        return list(numbered(self.output_dir, "iteration"))

    def checkpoints(self) -> list[Path]:
        """Trainer's checkpoints that are whole, the newest (the one of most steps) first."""
        found = numbered(self.output_dir, "checkpoint").values()
        return [path for path in found if (path / PLACE_FILE).exists()][::-1]

    # Run

    @contextmanager
    def lock(self) -> Iterator[None]:
        """
        Keep other processes from running here. A process that ends, in whatever way, lets go.

        Raises:
            [`RunDirectoryError`]: if another process runs here.
        """
        try:
            with writing(self.output_dir):
                make_directory(self.output_dir)
                held = FileLock(self.output_dir / ".lock").acquire(timeout=0)
        except Timeout as error:
            raise RunDirectoryError(
                f"Another process is running in `output_dir` ({self.output_dir}): it holds {error.lock_file}. Wait for "
                "it, end it, or choose another `output_dir`."
            ) from None
        with held:
            yield

    def write_run(self, description: dict[str, Any]) -> None:
        write_json(self.output_dir / "self_play.json", without_secrets(description))

    def has_run(self) -> bool:
        return (self.output_dir / "self_play.json").exists()

    def read_run(self) -> dict[str, Any]:
        path = self.output_dir / "self_play.json"
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise RunDirectoryError(
                f"{path} is not JSON ({error}), so what was run here is not known. Choose another `output_dir`, or set "
                "`overwrite_output_dir=True` to delete this run."
            ) from error

    def first_day(self) -> date:
        """The day on which the run began; today, if there is none."""
        starts = self.read_run().get("starts") if self.has_run() else None
        return datetime.fromisoformat(starts[0]["time"]).date() if starts else date.today()

    def write_invalid_rows(self, rows: list[dict[str, Any]]) -> None:
        """List the rows that were left out, one a line; no file where there are none."""
        path = self.output_dir / "invalid_rows.jsonl"
        if rows:
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        else:
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete the self-play run that lies here, and Trainer's checkpoints of it. Anything else stays."""
        self.clear_temporary()
        for path in self.output_dir.iterdir():
            is_data = path.name in _DATA and (path.is_symlink() or ArrowDirectory(path).checksum() is not None)
            is_numbered_directory = is_numbered(path) and (path.is_dir() or path.is_symlink())
            if is_data or is_numbered_directory or path.name in _FILES:
                remove(path)

    def clear_temporary(self) -> None:
        """Delete what an earlier process did not write to its end."""
        own = [self.path(number) for number in self.iterations()]
        kinds = [path / kind for path in own for kind in ("generations", "evaluation")]
        for directory in (self.output_dir, *own, *kinds):
            if directory.is_dir() and not directory.is_symlink():
                for path in filter(is_temporary, list(directory.iterdir())):
                    remove(path)

    def forget_after(self, iteration: int, step: int) -> None:
        """
        Delete iterations after `iteration`, and checkpoints after `step`, whole or not. Checkpoints that were there
        before the run are not its own.
        """
        for number in self.iterations():
            if number > iteration:
                remove(self.path(number))
        data = self.output_dir / "train_data"
        for number, path in numbered(self.output_dir, "checkpoint").items():
            if number > step and data.exists() and path.stat().st_mtime > data.stat().st_mtime:
                remove(path)

    # Data

    def write_data(self, dataset: Dataset, preferences: Dataset | None = None) -> None:
        """
        Write what the run trains on, in place of what an earlier start wrote: columns `row`, `source_row`, `prompt`,
        `prompt_ids` and `chosen_ids`; and the user's preference pairs.

        Raises:
            [`RunDirectoryError`]: if something else lies there.
        """
        for name, rows in zip(_DATA, (dataset, preferences), strict=True):
            if rows is None:
                continue
            kept = self._rows(name)
            if kept.path.exists() and kept.checksum() is None:
                raise RunDirectoryError(
                    f"{kept.path} is where a run keeps the data that it trains on, but what lies there is of no run. "
                    "Move it away, or choose another `output_dir`."
                )
            kept.write(batches(rows, rows.column_names), rows.features.arrow_schema)
        self._data = None

    def read_data(self) -> Dataset:
        """What the run trains on. It is mapped into memory once, however often it is read."""
        if self._data is None:
            self._data = self._rows("train_data").read()
        return self._data

    def read_preferences(self) -> Dataset | None:
        """The user's preference pairs, where the run has some."""
        kept = self._rows("preference_data")
        return kept.read() if kept.exists else None

    def has_whole_data(self, has_preferences: bool = False) -> bool:
        """Whether the run's data, and preference pairs if it has some, are there as this run wrote them."""
        kept = [self._rows(name) for name in _DATA]
        return kept[0].is_whole() and (kept[1].is_whole() or not (has_preferences or kept[1].exists))

    def _rows(self, name: str) -> ArrowDirectory:
        return ArrowDirectory(own_path(self.output_dir, name), {"run": self.run_id})

    # Iterations

    def write_opponent(self, iteration: int, save: Callable[[str], None], is_main_process: bool) -> Path:
        """
        Have the opponent saved by `save(directory)`, which every process calls; see [`write_whole`]. Returns the
        directory, complete on the main process as soon as this returns.
        """
        path = self.path(iteration, "opponent")

        def write(temporary: Path) -> None:
            save(str(temporary))
            if is_main_process:
                # Trainer pickles its arguments beside the weights; an opponent holds safetensors and JSON only.
                (temporary / "training_args.bin").unlink(missing_ok=True)

        write_whole(path, write, is_main_process)
        return path

    def completions(self, iteration: int, kind: str) -> CompletionParts:
        """The completions of `kind` ("generations" or "evaluation") of an iteration."""
        origin = {"run": self.run_id, "iteration": str(iteration), "kind": kind}
        return CompletionParts(self.path(iteration, kind), origin)

    @property
    def initial_answers(self) -> InitialAnswers:
        """What the initial policy answered. Iteration 0's pairs hold that already, as their rejected side."""
        rows = ArrowDirectory(self.path(0, "initial_answers"), {"run": self.run_id})
        return InitialAnswers(rows, self.completions(0, "generations"))

    def evaluation_pairs(self, iteration: int) -> ArrowDirectory:
        """The held-out pairs of an iteration's opponent, with its log-probs."""
        return ArrowDirectory(self.path(iteration, "evaluation-pairs"))

    def answers(self, iteration: int, kind: str = "answers") -> ArrowDirectory:
        """All "answers" of an iteration, or the "ranked" pairs that rewards made of them, until pairs are written."""
        return ArrowDirectory(temporary_path(self.path(iteration, kind), shared=True))

    def pairs(self, iteration: int) -> ArrowDirectory:
        """What an iteration adds to the run's data; see [`read_pairs`]."""
        return ArrowDirectory(self.path(iteration, "pairs"))

    def has_pairs(self, iteration: int) -> bool:
        return self.pairs(iteration).exists

    def write_pairs(self, iteration: int, answers: Dataset, scores: Mapping[str, np.ndarray]) -> None:
        """
        Write an iteration's training set: what it adds to the run's data.

        Args:
            answers ([`~datasets.Dataset`]): The side that the opponent made; see `pairs.ANSWER_SCHEMA`.
            scores (`dict[str, np.ndarray]`): Further columns, each of shape `(len(answers),)`.
        """
        self.pairs(iteration).write(_with_columns(answers, scores))

    def read_pairs(self, iteration: int) -> PairDataset:
        """
        An iteration's training set, with the columns of the run's data, and `initial_ids` where such are kept.

        Raises:
            [`RunDirectoryError`]: if it is not of these data.
        """
        data, preferences = self.read_data(), self.read_preferences()
        if preferences is not None:
            columns = ["row", *TRUTH_COLUMNS]
            data = concatenate_datasets([data.select_columns(columns), preferences.select_columns(columns)])
        try:
            pairs = PairDataset.join(data, self.pairs(iteration).read())
        except LookupError as error:
            raise RunDirectoryError(
                f"{error} They are not of the same run. Play it again with `overwrite_output_dir=True`."
            ) from error
        initial = self.initial_answers
        return initial.join(pairs) if iteration > 0 and initial.rows.exists else pairs

    def write_metrics(self, iteration: int, metrics: dict[str, Any]) -> None:
        """Merge `metrics` into the iteration's `metrics.json`."""
        write_json(self.path(iteration, "metrics.json"), {**self.read_metrics(iteration), **metrics})

    def read_metrics(self, iteration: int) -> dict[str, Any]:
        path = self.path(iteration, "metrics.json")
        return json.loads(path.read_text()) if path.exists() else {}

    def all_metrics(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The metrics of every iteration that has been begun, in order."""
        for iteration in self.iterations():
            yield iteration, self.read_metrics(iteration)


def _with_columns(dataset: Dataset, columns: Mapping[str, np.ndarray]) -> Iterator[pa.Table]:
    for number, batch in enumerate(batches(dataset, dataset.column_names)):
        rows = slice(number * BATCH_SIZE, number * BATCH_SIZE + len(batch))
        for name, values in columns.items():
            batch = batch.append_column(name, pa.array(values[rows]))
        yield batch
