"""The layout of a run directory, and atomic writes to it. Knows nothing of tensors or HTTP.

    output_dir/
      self_play.json                what was run: config, data, versions, and each start
      .lock                         held by the process that runs
      invalid_rows.jsonl            rows of the user's data that were left out: dataset, row, reason
      vllm-server.log               of a managed server; `.ended` beside it says why that will not come back
      iteration-0/
        opponent/                   adapter or model as published; absent where it is the base model
        generations/part-*.parquet  completions: row, sample, completion_ids, finish_reason; the name holds the first
                                    row, the size in bytes and the checksum
        evaluation/part-*.parquet   the same for the evaluation prompts
        evaluation-pairs.parquet    these answers and the ground truths, with the opponent's log-probs
        pairs/                      the iteration's training set, an Arrow dataset with the opponent's log-probs
        metrics.json
      iteration-1/ ...
      checkpoint-*/                 Trainer's own, and `self_play.json`: the place in the run, see `checkpoints`

Everything is written under a temporary name and renamed when it is whole: what carries its final name is complete.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_from_disk
from filelock import FileLock, Timeout

from .atomic_files import (
    checksum,
    checksum_of,
    finish_directory,
    is_temporary,
    make_directory,
    remove,
    temporary_path,
    write_directory,
    write_file,
    write_text,
)
from .disk import writing


logger = logging.getLogger(__name__)

_PART_NAME = re.compile(r"part-\d{8,}-(?P<size>\d+)-(?P<checksum>[0-9a-f]{16})\.parquet")
_NUMBERED = re.compile(r"(iteration|checkpoint)-(0|[1-9][0-9]*)")  # as a run names them: no "-01", no "-²"
_CHECKSUM_FILE = "checksum.txt"
_NOT_PAIRS = (_CHECKSUM_FILE, "cache-*", "tmp*")  # the `datasets` library keeps its caches beside the data
_KINDS = ("generations", "evaluation")

COMPLETION_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("sample", pa.int32()),
        ("completion_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
    ]
)


class RunDirectoryError(RuntimeError):
    """The run directory cannot be used: the message says what was found, what was expected and what to do."""


class IterationStore:
    """
    The files of one self-play run.

    Args:
        output_dir (`str` or `Path`): The run directory. Nothing is written before the first write.
        run_id (`str`): Name of the run, written into what it makes, so that another run's files are known as such.
    """

    def __init__(self, output_dir: str | Path, run_id: str = ""):
        self.output_dir = Path(output_dir).absolute()
        self.run_id = run_id

    def path(self, iteration: int, *names: str) -> Path:
        """
        Path of an iteration's directory, or of something in it.

        Raises:
            [`RunDirectoryError`]: if a link leads out of the run directory on the way.
        """
        return self._own(f"iteration-{iteration:d}", *names)

    @property
    def server_log(self) -> Path:
        return self._own("vllm-server.log")

    def _own(self, *names: str) -> Path:
        """A path in the run directory, none of whose parts is a link: what lies elsewhere is somebody else's."""
        path = self.output_dir
        for name in names:
            path = path / name
            if path.is_symlink():
                raise RunDirectoryError(
                    f"{path} is a link to {os.readlink(path)}, but a run reads and writes its own files only. Remove "
                    "the link; to keep a run elsewhere, make `output_dir` itself the link."
                )
        return path

    # What is there

    def iterations(self) -> list[int]:
        """Numbers of the iterations that have been begun, ascending."""
        return sorted(_number(path) for path in self._numbered("iteration"))

    def checkpoints(self) -> list[Path]:
        """Trainer's checkpoints, the newest (the one of most steps) first."""
        return sorted(self._numbered("checkpoint"), key=_number, reverse=True)

    def _numbered(self, kind: str) -> list[Path]:
        """Directories of a kind. A link is none: it may lead anywhere."""
        found = self.output_dir.glob(f"{kind}-*")
        return [path for path in found if _NUMBERED.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]

    def has_pairs(self, iteration: int) -> bool:
        return self.path(iteration, "pairs").is_dir()

    # Run

    @contextmanager
    def lock(self) -> Iterator[None]:
        """
        Keep other processes from running here. A process that ends, in whatever way, lets go.

        Raises:
            [`RunDirectoryError`]: if another process runs here.
        """
        lock = FileLock(self.output_dir / ".lock")
        try:
            with writing(self.output_dir):
                make_directory(self.output_dir)
                lock.acquire(timeout=0)
        except Timeout:
            raise RunDirectoryError(
                f"Another process is running in `output_dir` ({self.output_dir}): it holds {lock.lock_file}. Wait for "
                "it, end it, or choose another `output_dir`."
            ) from None
        try:
            yield
        finally:
            lock.release()

    def write_run(self, description: dict[str, Any]) -> None:
        write_text(self.output_dir / "self_play.json", to_json(description))

    def has_run(self) -> bool:
        return (self.output_dir / "self_play.json").exists()

    def mark_finished(self, **outcome: Any) -> None:
        """Note that nothing of the run is left to do, and what came of it."""
        self.write_run({**self.read_run(), **outcome, "finished": True})

    def read_run(self) -> dict[str, Any]:
        path = self.output_dir / "self_play.json"
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise RunDirectoryError(
                f"{path} is not JSON ({error}), so what was run here is not known. Choose another `output_dir`, or set "
                "`overwrite_output_dir=True` to delete this run."
            ) from error

    def write_invalid_rows(self, rows: list[dict[str, Any]]) -> None:
        """List the rows that were left out, one a line; no file where there are none."""
        path = self.output_dir / "invalid_rows.jsonl"
        if rows:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_text(path, text)
        else:
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete the self-play run that lies here, and Trainer's checkpoints of it. Anything else stays."""
        for path in self.output_dir.iterdir():
            if _NUMBERED.fullmatch(path.name) and (path.is_dir() or path.is_symlink()):
                remove(path)
        self.clear_temporary()
        for name in ("self_play.json", "invalid_rows.jsonl"):
            (self.output_dir / name).unlink(missing_ok=True)

    def clear_temporary(self) -> None:
        """Delete what an earlier process did not write to its end."""
        own = [self.path(number) for number in self.iterations()]
        for directory in (self.output_dir, *own, *(self.path(i) / kind for i in self.iterations() for kind in _KINDS)):
            if directory.is_dir() and not directory.is_symlink():
                for path in directory.iterdir():
                    if is_temporary(path):
                        remove(path)

    def forget_from(self, iteration: int) -> None:
        """Delete `iteration` and all later ones."""
        for number in self.iterations():
            if number >= iteration:
                remove(self.path(number))

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

    # Completions

    def write_completions(self, iteration: int, kind: str, first_row: int, columns: dict[str, list]) -> None:
        """Write one part of the completions of `kind` ("generations" or "evaluation")."""
        table = pa.table(columns, schema=COMPLETION_SCHEMA.with_metadata(self._origin(iteration, kind)))
        content = _to_parquet(table)

        def write(temporary: Path) -> None:
            temporary.write_bytes(content)

        name = f"part-{first_row:08d}-{len(content)}-{checksum_of(content)}.parquet"
        write_file(self.path(iteration, kind, name), write, num_bytes=len(content))

    def read_completions(self, iteration: int, kind: str) -> pa.Table:
        """
        All completions of an iteration, sorted by row and sample; empty if there are none.

        Raises:
            [`RunDirectoryError`]: if a part is torn, or of another run.
        """
        tables = []
        for part in self._parts(iteration, kind):
            problem = self._problem_of_part(part, iteration, kind)
            if problem is not None:
                raise RunDirectoryError(f"{part} {problem}. Delete it and start again: its completions are redone.")
            tables.append(pq.read_table(part, schema=COMPLETION_SCHEMA))
        table = pa.concat_tables(tables) if tables else COMPLETION_SCHEMA.empty_table()
        return table.sort_by([("row", "ascending"), ("sample", "ascending")])

    def completed_rows(self, iteration: int, kind: str) -> set[int]:
        """Rows whose completions are already on disk. Parts that are torn or of another run are deleted first."""
        for part in self._parts(iteration, kind):
            problem = self._problem_of_part(part, iteration, kind)
            if problem is not None:
                logger.warning(f"{part} {problem}: its completions are redone.")
                remove(part)
        return set(self.read_completions(iteration, kind)["row"].to_pylist())

    def _parts(self, iteration: int, kind: str) -> list[Path]:
        return sorted(self.path(iteration, kind).glob("part-*.parquet"))

    def _origin(self, iteration: int, kind: str) -> dict[str, str]:
        return {"run": self.run_id, "iteration": str(iteration), "kind": kind}

    def _problem_of_part(self, part: Path, iteration: int, kind: str) -> str | None:
        """What is wrong with a file that should be a whole part of this run's, if anything."""
        expected = _PART_NAME.fullmatch(part.name)
        if expected is None:
            return "is not a part of a run: its name should hold its first row, size and checksum"
        if part.stat().st_size != int(expected["size"]):
            return f"is torn: {part.stat().st_size} bytes, not the {expected['size']} of its name"
        if checksum(part) != expected["checksum"]:
            return "is damaged: its content does not have the checksum of its name"
        metadata = pq.read_schema(part).metadata or {}
        origin = self._origin(iteration, kind)
        found = {name: metadata.get(name.encode(), b"").decode(errors="replace") for name in origin}
        return None if found == origin else f"is of another origin: {found}, not {origin}"

    # Pairs

    def write_pairs(self, iteration: int, pairs: Dataset) -> None:
        def write(temporary: Path) -> None:
            pairs.save_to_disk(str(temporary))
            (temporary / _CHECKSUM_FILE).write_text(checksum(temporary, without=_NOT_PAIRS))

        write_directory(self.path(iteration, "pairs"), write, num_bytes=_size_of(pairs))
        for pattern in _NOT_PAIRS[1:]:  # what mixing in the history left there, as large as the pairs
            for path in self.output_dir.glob(f"iteration-*/pairs/{pattern}"):
                remove(path)

    def read_pairs(self, iteration: int) -> Dataset:
        """
        Raises:
            [`RunDirectoryError`]: if they name files that do not lie with them.
        """
        path = self.path(iteration, "pairs")
        for file in json.loads((path / "state.json").read_text()).get("_data_files", []):
            if Path(file["filename"]).name != file["filename"]:
                raise RunDirectoryError(
                    f"{path / 'state.json'} names {file['filename']!r}, but the files of a dataset lie beside it. "
                    f"Somebody has changed it: delete {path} and start again, and the pairs are made again."
                )
            self.path(iteration, "pairs", file["filename"])
        return load_from_disk(str(path))

    def pairs_checksum(self, iteration: int) -> str | None:
        """The checksum that an iteration's pairs were written with; `None` where there are none."""
        path = self.path(iteration, "pairs", _CHECKSUM_FILE)
        return path.read_text() if path.exists() else None

    def has_whole_pairs(self, iteration: int) -> bool:
        """Whether an iteration's pairs are there and as they were written."""
        path = self.path(iteration, "pairs")
        return path.is_dir() and self.pairs_checksum(iteration) == checksum(path, without=_NOT_PAIRS)

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
        merged = {**self.read_metrics(iteration), **metrics}
        write_text(path, to_json(merged))

    def read_metrics(self, iteration: int) -> dict[str, Any]:
        path = self.path(iteration, "metrics.json")
        return json.loads(path.read_text()) if path.exists() else {}

    def all_metrics(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The metrics of every iteration that has been begun, in order."""
        for iteration in self.iterations():
            yield iteration, self.read_metrics(iteration)


def _to_parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def _size_of(pairs: Dataset) -> int:
    """Bytes of the columns in memory, which are written as they are; a selection of rows is written alone."""
    return round(pairs.data.nbytes * len(pairs) / max(1, pairs.data.num_rows))


def _number(path: Path) -> int:
    return int(path.name.partition("-")[2])


def to_json(value: Any) -> str:
    """A value as the run directory's JSON files hold it."""
    return json.dumps(value, indent=2, default=str) + "\n"
