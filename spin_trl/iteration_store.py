"""The layout of a run directory, and atomic writes to it. Knows nothing of tensors or HTTP.

    output_dir/
      self_play.json                what was run: config, data, versions
      invalid_rows.jsonl            rows of the user's data that were left out: dataset, row, reason
      vllm-server.log               of a managed server
      iteration-0/
        opponent/                   adapter or model as published; absent where it is the base model
        generations/part-*.parquet  completions: row, sample, completion_ids, finish_reason
        evaluation/part-*.parquet   the same for the evaluation prompts
        pairs/                      the iteration's training set, an Arrow dataset with the opponent's log-probs
        metrics.json
      iteration-1/ ...
      checkpoint-*/                 Trainer's own

Everything is written under a temporary name and renamed when it is whole: what carries its final name is complete.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_from_disk


COMPLETION_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("sample", pa.int32()),
        ("completion_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
    ]
)


class IterationStore:
    """
    The files of one self-play run.

    Args:
        output_dir (`str` or `Path`): The run directory. Nothing is written before the first write.
    """

    def __init__(self, output_dir: str | Path):
        self.output_dir = Path(output_dir).absolute()

    def path(self, iteration: int, *names: str) -> Path:
        """Path of an iteration's directory, or of something in it."""
        return self.output_dir.joinpath(f"iteration-{iteration}", *names)

    @property
    def server_log(self) -> Path:
        return self.output_dir / "vllm-server.log"

    # What is there

    def iterations(self) -> list[int]:
        """Numbers of the iterations that have been begun, ascending."""
        found = (p.name.removeprefix("iteration-") for p in self.output_dir.glob("iteration-*") if p.is_dir())
        return sorted(int(number) for number in found if number.isdigit())

    def has_pairs(self, iteration: int) -> bool:
        return self.path(iteration, "pairs").is_dir()

    # Run

    def write_run(self, description: dict[str, Any]) -> None:
        _write_atomically(self.output_dir / "self_play.json", lambda path: path.write_text(_to_json(description)))

    def read_run(self) -> dict[str, Any]:
        return json.loads((self.output_dir / "self_play.json").read_text())

    def write_invalid_rows(self, rows: list[dict[str, Any]]) -> None:
        """List the rows that were left out, one a line; no file where there are none."""
        path = self.output_dir / "invalid_rows.jsonl"
        if rows:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            _write_atomically(path, lambda temporary: temporary.write_text(text))
        else:
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete the self-play run that lies here, and Trainer's checkpoints of it. Anything else stays."""
        for path in self.output_dir.iterdir():
            kind, _, number = path.name.partition("-")
            if kind in ("iteration", "checkpoint") and number.isdigit() and path.is_dir():
                shutil.rmtree(path)
        for name in ("self_play.json", "invalid_rows.jsonl"):
            (self.output_dir / name).unlink(missing_ok=True)

    # Opponent

    def write_opponent(self, iteration: int, save: Callable[[str], None], is_main_process: bool) -> Path:
        """
        Have the opponent saved by `save(directory)`, which every process calls, and give the directory its name.

        Returns:
            `Path`: the directory, complete on the main process as soon as this returns.
        """
        path = self.path(iteration, "opponent")
        temporary = path.with_name("opponent.tmp")
        if is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        save(str(temporary))
        if is_main_process:
            # Trainer pickles its arguments beside the weights; an opponent holds safetensors and JSON only.
            (temporary / "training_args.bin").unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
            temporary.rename(path)
        return path

    # Completions

    def write_completions(self, iteration: int, kind: str, part: str, columns: dict[str, list]) -> None:
        """Write one part of the completions of `kind` ("generations" or "evaluation") under the name `part`."""
        table = pa.table(columns, schema=COMPLETION_SCHEMA)
        path = self.path(iteration, kind, f"part-{part}.parquet")
        _write_atomically(path, lambda temporary: pq.write_table(table, temporary))

    def read_completions(self, iteration: int, kind: str) -> pa.Table:
        """All completions of an iteration, sorted by row and sample; empty if there are none."""
        parts = sorted(self.path(iteration, kind).glob("part-*.parquet"))
        tables = [pq.read_table(part, schema=COMPLETION_SCHEMA) for part in parts]
        table = pa.concat_tables(tables) if tables else COMPLETION_SCHEMA.empty_table()
        return table.sort_by([("row", "ascending"), ("sample", "ascending")])

    def completed_rows(self, iteration: int, kind: str) -> set[int]:
        """Rows whose completions are already on disk. A part holds all samples of its rows."""
        return set(self.read_completions(iteration, kind)["row"].to_pylist())

    # Pairs

    def write_pairs(self, iteration: int, pairs: Dataset) -> None:
        path = self.path(iteration, "pairs")
        temporary = path.with_name("pairs.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        pairs.save_to_disk(str(temporary))
        temporary.rename(path)

    def read_pairs(self, iteration: int) -> Dataset:
        return load_from_disk(str(self.path(iteration, "pairs")))

    # Metrics

    def write_metrics(self, iteration: int, metrics: dict[str, Any]) -> None:
        """Merge `metrics` into the iteration's `metrics.json`."""
        path = self.path(iteration, "metrics.json")
        merged = {**self.read_metrics(iteration), **metrics}
        _write_atomically(path, lambda temporary: temporary.write_text(_to_json(merged)))

    def read_metrics(self, iteration: int) -> dict[str, Any]:
        path = self.path(iteration, "metrics.json")
        return json.loads(path.read_text()) if path.exists() else {}

    def all_metrics(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The metrics of every iteration that has been begun, in order."""
        for iteration in self.iterations():
            yield iteration, self.read_metrics(iteration)


def _write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def _to_json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, default=str) + "\n"
