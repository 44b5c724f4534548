"""Prompts, ground truths and completions of a run directory, read batch by batch with Arrow alone.

The one file of the report that knows where rows lie. It opens what the run writes whole and renames, so that reading
beside a run that goes on is safe; what is damaged is left out with a line in `problems`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..run_directory.whole_files import checksum


_ITERATION = re.compile(r"iteration-(0|[1-9][0-9]*)")
_PART = re.compile(r"part-\d+-(?P<size>\d+)-(?P<checksum>[0-9a-f]{16})\.parquet")
_BATCH_SIZE = 4096


@dataclass
class RunRows:
    """
    The rows of one run.

    Args:
        directory (`Path`): The run directory.
        problems (`list[str]`): Lines that say what could not be read; reading adds to them, each once.
    """

    directory: Path
    problems: list[str] = field(default_factory=list)

    def iterations(self) -> list[int]:
        """Numbers of the iterations that have been begun, ascending."""
        names = (_ITERATION.fullmatch(path.name) for path in self.directory.iterdir() if path.is_dir())
        return sorted(int(name[1]) for name in names if name)

    def has_completions(self, iteration: int) -> bool:
        return bool(self._parts(iteration))

    def truths(self, columns: list[str], rows: np.ndarray | None = None) -> Iterator[pa.Table]:
        """
        Prompts and ground truths.

        Args:
            columns (`list[str]`): Of `row`, `source_row`, `prompt`, `prompt_ids` and `chosen_ids`. Those that the run
                does not keep are left out.
            rows (`np.ndarray`, *optional*): Only these.
        """
        for path in sorted((self.directory / "train_data").glob("*.arrow")):
            for table in self._arrow_batches(path, ["row", *(name for name in columns if name != "row")]):
                yield _only(table, rows)

    def completions(self, iteration: int, columns: list[str], rows: np.ndarray | None = None) -> Iterator[pa.Table]:
        """
        The opponent's completions, part by part.

        Args:
            iteration (`int`): Whose.
            columns (`list[str]`): Of `row`, `sample`, `completion_ids` and `finish_reason`.
            rows (`np.ndarray`, *optional*): Only these.
        """
        for path in self._parts(iteration):
            try:
                self._check_part(path)
                file = pq.ParquetFile(path)
                for batch in file.iter_batches(_BATCH_SIZE, columns=["row", *(c for c in columns if c != "row")]):
                    yield _only(pa.Table.from_batches([batch]), rows)
            except (OSError, ValueError, pa.ArrowException) as error:
                self._note(path, error)

    def _parts(self, iteration: int) -> list[Path]:
        return sorted((self.directory / f"iteration-{iteration}" / "generations").glob("part-*.parquet"))

    def _check_part(self, path: Path) -> None:
        """The name of a part holds its size and its checksum."""
        expected = _PART.fullmatch(path.name)
        if expected is None:
            return
        if path.stat().st_size != int(expected["size"]):
            raise ValueError(f"torn: {path.stat().st_size} bytes, not the {expected['size']} of its name")
        if checksum(path) != expected["checksum"]:
            raise ValueError("damaged: its content does not have the checksum of its name")

    def _arrow_batches(self, path: Path, columns: list[str]) -> Iterator[pa.Table]:
        try:
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
                present = [name for name in columns if name in reader.schema.names]
                for batch in reader:
                    yield pa.Table.from_batches([batch]).select(present)
        except (OSError, ValueError, pa.ArrowException) as error:
            self._note(path, error)

    def _note(self, path: Path, error: Exception) -> None:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        line = f"{path.relative_to(self.directory)} is left out: {reason}"
        if line not in self.problems:
            self.problems.append(line)


def _only(table: pa.Table, rows: np.ndarray | None) -> pa.Table:
    return table if rows is None else table.filter(pc.is_in(table["row"], pa.array(rows)))
