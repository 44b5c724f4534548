"""Rows in an Arrow file, with its checksum beside it, in a directory that is there whole or not at all.

They are written batch by batch and read by mapping the file into memory. Knows nothing of what the rows are.
"""

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
from datasets import Dataset

from ..data.columns import write_rows
from .run_paths import own_path
from .whole_files import checksum, write_directory


_ROWS_FILE = "rows.arrow"
_CHECKSUM_FILE = "checksum.txt"


def write_arrow(path: Path, tables: Iterable[pa.Table], schema: pa.Schema, num_bytes: int) -> None:
    """
    Args:
        path (`Path`): The directory. What is there is replaced.
        tables (`Iterable[pyarrow.Table]`): The rows.
        schema (`pyarrow.Schema`): Theirs.
        num_bytes (`int`): About what they take, for the error.

    Raises:
        [`DiskError`]: if the disk does not take it. Nothing is left of it then.
    """

    def write(temporary: Path) -> None:
        temporary.mkdir()
        write_rows(temporary / _ROWS_FILE, tables, schema)
        (temporary / _CHECKSUM_FILE).write_text(checksum(temporary / _ROWS_FILE))

    write_directory(path, write, num_bytes)


def read_arrow(path: Path) -> Dataset:
    """
    Raises:
        [`RunDirectoryError`]: if the file is a link.
    """
    return Dataset.from_file(str(own_path(path, _ROWS_FILE)))


def arrow_metadata(path: Path) -> dict[bytes, bytes]:
    """What the schema of the rows says besides, as it was written."""
    with pa.memory_map(str(own_path(path, _ROWS_FILE))) as file:
        return pa.ipc.open_stream(file).schema.metadata or {}


def arrow_checksum(path: Path) -> str | None:
    """The checksum that the rows were written with; `None` where there are none."""
    file = own_path(path, _CHECKSUM_FILE)
    return file.read_text() if file.exists() else None


def is_whole_arrow(path: Path) -> bool:
    """Whether the rows are there and as they were written."""
    file = own_path(path, _ROWS_FILE)
    return file.is_file() and arrow_checksum(path) == checksum(file)
