"""Columns of a dataset as arrays, read batch by batch. Knows nothing of what the columns mean.

A dataset may be larger than memory, so no function here holds its rows: at most one number for each of them.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset


BATCH_SIZE = 1000  # rows


def batches(dataset: Dataset, columns: Sequence[str], batch_size: int = BATCH_SIZE) -> Iterator[pa.Table]:
    """The rows of some columns, so many at a time, each column in one chunk."""
    for batch in dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size):
        yield batch.combine_chunks()


def numbers(dataset: Dataset, column: str) -> np.ndarray:
    """A column of numbers, of shape `(len(dataset),)`."""
    return joined(batch[column].to_numpy() for batch in batches(dataset, [column]))


def list_lengths(dataset: Dataset, column: str) -> np.ndarray:
    """Lengths of a column's lists, of shape `(len(dataset),)`. The lists themselves are not looked at."""
    return joined(lengths_of(batch[column]) for batch in batches(dataset, [column]))


def lengths_of(lists: pa.ChunkedArray) -> np.ndarray:
    """Lengths of the lists of one batch, of shape `(len(lists),)`."""
    return pc.list_value_length(lists).to_numpy()


def positions_of(wanted: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Where in `values`, all of which differ, the wanted ones are: the positions of those that are there, and which these
    are, a mask of the shape of `wanted`.
    """
    found = pc.index_in(pa.array(wanted), value_set=pa.array(values))
    return found.drop_null().to_numpy(), found.is_valid().to_numpy(zero_copy_only=False)


def write_rows(path: Path, tables: Iterable[pa.Table], schema: pa.Schema | None = None) -> None:
    """
    Write tables one after the other to an Arrow file, which `Dataset.from_file` maps into memory. Without a schema
    there is at least one, and they have its.
    """
    if schema is None:
        tables = iter(tables)
        first = next(tables)
        tables, schema = chain([first], tables), first.schema
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for table in tables:
            writer.write_table(table.cast(schema).combine_chunks(), max_chunksize=BATCH_SIZE)


def joined(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """The arrays of all batches as one; of no batch, an empty one of whole numbers."""
    arrays = list(arrays)
    return np.concatenate(arrays) if arrays else np.empty(0, np.int64)
