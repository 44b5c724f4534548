"""Completions on disk, in parts that are known to be whole by their names and to be the run's by their content.

A part is a Parquet file: row, sample, completion_ids, finish_reason, and, where several opponents answer, opponent (the
number of its iteration). Its name holds its first row and its checksum; its metadata the run, the iteration and the
kind. Parts are read one after the other, never all at once.
"""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..data.draw import OPPONENT_FIELD
from .run_paths import RunDirectoryError
from .whole_files import checksum, remove, write_whole


logger = logging.getLogger(__name__)

_PART_NAME = re.compile(r"part-\d{8,}-(?P<checksum>[0-9a-f]{16})\.parquet")
_FIELDS = (
    pa.field("row", pa.int64()),
    pa.field("sample", pa.int32()),
    pa.field("completion_ids", pa.list_(pa.int32())),
    pa.field("finish_reason", pa.string()),
    OPPONENT_FIELD,
)
COMPLETION_SCHEMA = pa.schema(_FIELDS[:-1])  # where one opponent answers


@dataclass(frozen=True)
class CompletionParts:
    """The completions of one kind of one iteration. `origin` is run, iteration and kind; empty for any."""

    directory: Path
    origin: dict[str, str]

    def write(self, first_row: int, columns: dict[str, list]) -> None:
        """
        Write one part.

        Raises:
            [`DiskError`]: if the disk does not take it. Nothing is left of it then.
        """
        schema = pa.schema([field for field in _FIELDS if field.name in columns], self.origin)
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns, schema=schema), sink)
        content = sink.getvalue()
        path = self.directory / f"part-{first_row:08d}-{checksum(content)}.parquet"
        write_whole(path, lambda temporary: temporary.write_bytes(content))

    def completed_rows(self) -> np.ndarray:
        """Rows that are on disk, ascending. Parts that are damaged or of another run are deleted first."""
        rows = [np.empty(0, np.int64)]
        for path in self.paths():
            try:
                rows.append(self.read(path, ["row"])["row"].to_numpy())
            except RunDirectoryError as error:
                logger.warning(f"{error} Its completions are redone.")
                remove(path)
        return np.unique(np.concatenate(rows))

    def batches(self, batch_size: int = 4096) -> Iterator[pa.Table]:
        """
        All completions, sorted by row and sample, so many at a time.

        Raises:
            [`RunDirectoryError`]: if a part is damaged, or of another run.
        """
        paths = self.paths()
        keys = [self.read(path, ["row", "sample"]) for path in paths]  # two numbers for each completion
        if not keys:
            return
        order = np.lexsort([np.concatenate([part[name].to_numpy() for part in keys]) for name in ("sample", "row")])
        starts = np.cumsum([0, *map(len, keys)])
        del keys
        for first in range(0, len(order), batch_size):
            wanted = order[first : first + batch_size]
            part_of = np.searchsorted(starts, wanted, side="right") - 1
            parts, number = np.unique(part_of, return_inverse=True)
            tables = [self.read(paths[part]) for part in parts]
            starts_here = np.cumsum([0, *map(len, tables)])
            yield pa.concat_tables(tables).take(wanted - starts[part_of] + starts_here[number])

    def paths(self) -> list[Path]:
        """The parts, in the order of their rows."""
        return sorted(self.directory.glob("part-*.parquet"))

    def read(self, path: Path, columns: list[str] | None = None) -> pa.Table:
        """
        Some columns of a part, or all.

        Raises:
            [`RunDirectoryError`]: if it is not a whole part of this run's.
        """

        def refuse(problem: str) -> RunDirectoryError:
            return RunDirectoryError(f"{path} {problem}. Delete it and start again: its completions are made again.")

        expected = _PART_NAME.fullmatch(path.name)
        if expected is None:
            raise refuse("is not a part of a run: its name should hold its first row and checksum")
        content = path.read_bytes()
        if checksum(content) != expected["checksum"]:
            raise refuse("is damaged: its content does not have the checksum of its name")
        file = pq.ParquetFile(pa.BufferReader(content))
        metadata = file.schema_arrow.metadata or {}
        found = {name: metadata.get(name.encode(), b"").decode(errors="replace") for name in self.origin}
        if found != self.origin:
            raise refuse(f"is of another origin: {found}, not {self.origin}")
        wanted = [field for field in _FIELDS if field.name in (columns or file.schema_arrow.names)]
        table = file.read([field.name for field in wanted], use_threads=False)
        return table.replace_schema_metadata(None).cast(pa.schema(wanted))
