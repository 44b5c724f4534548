"""Rows in an Arrow file, with its checksum beside it, in a directory that is there whole or not at all.

They are written batch by batch and read by mapping the file into memory. Knows nothing of what the rows are.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
from datasets import Dataset

from ..data.columns import write_rows
from .run_paths import own_path
from .whole_files import checksum, write_whole


_ROWS_FILE = "rows.arrow"
_CHECKSUM_FILE = "checksum.txt"


@dataclass(frozen=True)
class ArrowDirectory:
    """Rows at `path`. `origin` is what they have to be of, such as the run, kept with their schema."""

    path: Path
    origin: dict[str, str] = field(default_factory=dict)

    @property
    def exists(self) -> bool:
        return self.path.is_dir()

    def write(self, tables: Iterable[pa.Table], schema: pa.Schema | None = None) -> None:
        """
        Write the rows, in place of what is there. Without a schema they have the first table's, and no origin is kept.

        Raises:
            [`DiskError`]: if the disk does not take them. Nothing is left of them then.
        """
        if schema is not None:
            schema = schema.with_metadata({**(schema.metadata or {}), **self.origin})

        def write(temporary: Path) -> None:
            temporary.mkdir()
            write_rows(temporary / _ROWS_FILE, tables, schema)
            (temporary / _CHECKSUM_FILE).write_text(checksum(temporary / _ROWS_FILE))

        write_whole(self.path, write)

    def read(self) -> Dataset:
        """
        Raises:
            [`RunDirectoryError`]: if the file is a link.
        """
        return Dataset.from_file(str(own_path(self.path, _ROWS_FILE)))

    def checksum(self) -> str | None:
        """The checksum that the rows were written with; `None` where there are none."""
        file = own_path(self.path, _CHECKSUM_FILE)
        return file.read_text() if file.exists() else None

    def is_whole(self) -> bool:
        """Whether the rows are there, as they were written, and of this origin."""
        path = own_path(self.path, _ROWS_FILE)
        if not path.is_file() or checksum(path) != self.checksum():
            return False
        with pa.memory_map(str(path)) as file:
            found = pa.ipc.open_stream(file).schema.metadata or {}
        return all(found.get(name.encode()) == value.encode() for name, value in self.origin.items())
