"""The layout of a run directory, and atomic writes to it. Knows nothing of tensors or HTTP.

    output_dir/
      self_play.json                what was run: config, data, versions, and each start
      .lock                         held by the process that runs
      log.jsonl                     what was logged, one entry a line, as the run goes
      report.html, report/          the run on one page, and its pictures; see `report`
      invalid_rows.jsonl            rows of the user's data that were left out: dataset, row, reason
      train_data/                   what is trained on: row, source_row, prompt, prompt_ids, chosen_ids, an Arrow file
      preference_data/              the user's preference pairs: iteration (-1), row (from -1 down), source_row, sample,
                                    prompt_ids, chosen_ids, rejected_ids
      vllm-server.log               of a managed server; `.ended` beside it says why that will not come back
      iteration-0/
        opponent/                   adapter or model as published; absent where it is the base model
        generations/part-*.parquet  completions: row, sample, completion_ids, finish_reason, with `num_opponents` above
                                    1 also opponent, the number of its iteration
        initial_answers/            the same in one Arrow file, in iteration 0 alone, where later ones compare with them
        evaluation/part-*.parquet   the same for the evaluation prompts
        evaluation-pairs.parquet    these answers and the ground truths, with the opponent's log-probs
        pairs/                      what the iteration adds to `train_data`, an Arrow file: iteration, row, source_row,
                                    sample, rejected_ids and the opponent's log-probs; with reward functions also
                                    chosen_reward and rejected_reward, and where these choose the sides, chosen_sample
                                    and chosen_ids; with several opponents, opponent
        metrics.json
      iteration-1/ ...
      merged/                       the final adapter merged into its base
      checkpoint-*/                 Trainer's own, and `self_play.json`: the place in the run, see `checkpoints`

Everything is written under a temporary name and renamed when it is whole: what carries its final name is complete.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, concatenate_datasets

from ..data.columns import BATCH_SIZE, batches, num_bytes_of, write_rows
from ..data.pair_dataset import TRUTH_COLUMNS, PairDataset
from .arrow_directory import arrow_checksum, arrow_metadata, is_whole_arrow, read_arrow, write_arrow
from .completion_parts import COMPLETION_SCHEMA, CompletionParts
from .disk import writing
from .initial_answers import InitialAnswers
from .run_files import RunFiles
from .run_paths import RunDirectoryError
from .whole_files import finish_directory, remove, temporary_path, write_file, write_json


class IterationStore(RunFiles):
    """
    Differs from [`RunFiles`] in that it knows what lies in an iteration, and the data that iterations share.

    Args:
        output_dir (`str` or `Path`): The run directory. Nothing is written before the first write.
        run_id (`str`): Name of the run, written into what it makes, so that another run's files are known as such.
    """

    def __init__(self, output_dir: str | Path, run_id: str = ""):
        super().__init__(output_dir)
        self.run_id = run_id
        self._data: Dataset | None = None

    # Opponent

    def write_opponent(
        self, iteration: int, save: Callable[[str], None], is_main_process: bool, num_bytes: int | None = None
    ) -> Path:
        """
        Have the opponent saved by `save(directory)`, which every process calls, and give the directory its name.

        Args:
            num_bytes (`int`, *optional*): Bytes that it needs, where known, for the error.

        Returns:
            `Path`: the directory, complete on the main process as soon as this returns.

        Raises:
            [`DiskError`]: if the disk does not take it. Nothing is left of it then.
        """
        path = self.path(iteration, "opponent")
        temporary = temporary_path(path, shared=True)
        if is_main_process:
            remove(temporary)
        with writing(path, num_bytes):
            try:
                save(str(temporary))
                if is_main_process:
                    # Trainer pickles its arguments beside the weights; an opponent holds safetensors and JSON only.
                    (temporary / "training_args.bin").unlink(missing_ok=True)
                    finish_directory(temporary, path)
            finally:
                if is_main_process and temporary.exists():
                    remove(temporary)
        return path

    # Data

    def write_data(self, dataset: Dataset) -> None:
        """
        Write what the run trains on, in place of what an earlier start wrote.

        Args:
            dataset ([`~datasets.Dataset`]): With the columns `row`, `source_row`, `prompt`, `prompt_ids` and
                `chosen_ids`.

        Raises:
            [`RunDirectoryError`]: if something else lies there.
        """
        self._write_data("train_data", dataset)
        self._data = None

    def write_preferences(self, dataset: Dataset) -> None:
        """Write the user's preference pairs, as `write_data` does."""
        self._write_data("preference_data", dataset)

    def _write_data(self, name: str, dataset: Dataset) -> None:
        path = self._own(name)
        if path.exists() and arrow_checksum(path) is None:
            raise RunDirectoryError(
                f"{path} is where a run keeps the data that it trains on, but what lies there is of no run. Move it "
                "away, or choose another `output_dir`."
            )
        schema = dataset.features.arrow_schema
        schema = schema.with_metadata({**(schema.metadata or {}), "run": self.run_id})
        write_arrow(path, batches(dataset, dataset.column_names), schema, num_bytes_of(dataset))

    def read_data(self) -> Dataset:
        """What the run trains on. It is mapped into memory once, however often it is read."""
        if self._data is None:
            self._data = read_arrow(self._own("train_data"))
        return self._data

    def read_preferences(self) -> Dataset | None:
        """The user's preference pairs, where the run has some."""
        path = self._own("preference_data")
        return read_arrow(path) if path.is_dir() else None

    def has_whole_data(self, has_preferences: bool | None = None) -> bool:
        """
        Whether the run's data are there and as this run wrote them.

        Args:
            has_preferences (`bool`, *optional*): Whether there have to be preference pairs. By default they count if
                they are there.
        """
        if has_preferences is None:
            has_preferences = self._own("preference_data").is_dir()
        return self._is_whole("train_data") and (not has_preferences or self._is_whole("preference_data"))

    def _is_whole(self, name: str) -> bool:
        path = self._own(name)
        return is_whole_arrow(path) and arrow_metadata(path).get(b"run") == self.run_id.encode()

    # Completions

    def completions(self, iteration: int, kind: str) -> CompletionParts:
        """The completions of `kind` ("generations" or "evaluation") of an iteration."""
        origin = {"run": self.run_id, "iteration": str(iteration), "kind": kind}
        return CompletionParts(self.path(iteration, kind), origin)

    def write_completions(self, iteration: int, kind: str, first_row: int, columns: dict[str, list]) -> None:
        """Write one part of an iteration's completions."""
        self.completions(iteration, kind).write(first_row, columns)

    def completed_rows(self, iteration: int, kind: str) -> np.ndarray:
        """Rows whose completions are already on disk. Parts that are torn or of another run are deleted first."""
        return self.completions(iteration, kind).completed_rows()

    def read_completions(self, iteration: int, kind: str) -> pa.Table:
        """All completions of an iteration at once, to look at. What the run does reads them in batches."""
        tables = list(self.completions(iteration, kind).batches())
        return pa.concat_tables(tables) if tables else COMPLETION_SCHEMA.empty_table()

    # Pairs

    def has_pairs(self, iteration: int) -> bool:
        return self.path(iteration, "pairs").is_dir()

    def write_answers(self, iteration: int, tables: Iterable[pa.Table], num_bytes: int, kind: str = "answers") -> None:
        """Write the opponent's side of an iteration's pairs, for the time until they are scored."""
        path = self._answers(iteration, kind)
        with writing(path, num_bytes):
            write_rows(path, tables)

    def read_answers(self, iteration: int, kind: str = "answers") -> Dataset:
        """What `write_answers` wrote: all "answers" of an opponent, or the "ranked" pairs that rewards made of them."""
        return Dataset.from_file(str(self._answers(iteration, kind)))

    def remove_answers(self, iteration: int) -> None:
        for kind in ("answers", "ranked"):
            remove(self._answers(iteration, kind))

    def _answers(self, iteration: int, kind: str) -> Path:
        return temporary_path(self.path(iteration, kind), shared=True)

    def write_pairs(self, iteration: int, answers: Dataset, scores: Mapping[str, np.ndarray]) -> None:
        """
        Write an iteration's training set: what it adds to the run's data.

        Args:
            iteration (`int`): Number of the iteration.
            answers ([`~datasets.Dataset`]): The side that the opponent made; see `pairs.ANSWER_SCHEMA`.
            scores (`dict[str, np.ndarray]`): Further columns, each of shape `(len(answers),)`.

        Raises:
            [`DiskError`]: if the disk does not take it. Nothing is left of it then.
        """
        path = self.path(iteration, "pairs")
        schema = answers.features.arrow_schema.remove_metadata()
        for name, values in scores.items():
            schema = schema.append(pa.field(name, pa.from_numpy_dtype(values.dtype)))
        num_bytes = num_bytes_of(answers) + sum(values.nbytes for values in scores.values())
        write_arrow(path, _with_columns(answers, scores), schema, num_bytes)

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
            pairs = PairDataset.join(data, read_arrow(self.path(iteration, "pairs")))
        except LookupError as error:
            raise RunDirectoryError(
                f"{error} They are not of the same run. Play it again with `overwrite_output_dir=True`."
            ) from error
        return self.initial_answers.join(pairs) if iteration > 0 and self.initial_answers.are_kept else pairs

    @property
    def initial_answers(self) -> InitialAnswers:
        """What the initial policy answered. Iteration 0's pairs hold that already, as their rejected side."""
        return InitialAnswers(self.path(0, "initial_answers"), self.completions(0, "generations"), self.run_id)

    def pairs_checksum(self, iteration: int) -> str | None:
        """The checksum that an iteration's pairs were written with; `None` where there are none."""
        return arrow_checksum(self.path(iteration, "pairs"))

    def has_whole_pairs(self, iteration: int) -> bool:
        """Whether an iteration's pairs are there and as they were written."""
        return is_whole_arrow(self.path(iteration, "pairs"))

    # Evaluation

    def write_evaluation_pairs(self, iteration: int, pairs: pa.Table) -> None:
        content = _to_parquet(pairs)
        path = self.path(iteration, "evaluation-pairs.parquet")
        write_file(path, lambda temporary: temporary.write_bytes(content), num_bytes=len(content))

    def read_evaluation_pairs(self, iteration: int) -> pa.Table | None:
        """The held-out pairs of an iteration's opponent, with its log-probs; `None` where there are none."""
        path = self.path(iteration, "evaluation-pairs.parquet")
        return pq.read_table(path) if path.exists() else None

    # Metrics

    def write_metrics(self, iteration: int, metrics: dict[str, Any]) -> None:
        """Merge `metrics` into the iteration's `metrics.json`."""
        path = self.path(iteration, "metrics.json")
        write_json(path, {**self.read_metrics(iteration), **metrics})

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


def _to_parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()
