"""Columns of a dataset as arrays, read batch by batch. Knows nothing of what the columns mean.

A dataset may be larger than memory, so no function here holds its rows: at most one number for each of them.
"""

from collections.abc import Iterable, Iterator, Sequence
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
    return _joined(batch[column].to_numpy() for batch in batches(dataset, [column]))


def list_lengths(dataset: Dataset, column: str) -> np.ndarray:
    """Lengths of a column's lists, of shape `(len(dataset),)`. The lists themselves are not looked at."""
    return _joined(pc.list_value_length(batch[column]).to_numpy() for batch in batches(dataset, [column]))


def equal_lists(left: pa.ChunkedArray, right: pa.ChunkedArray) -> np.ndarray:
    """Where two columns hold the same list of numbers, of shape `(len(left),)`."""
    lengths = pc.list_value_length(left).to_numpy()
    equal = lengths == pc.list_value_length(right).to_numpy()
    of_equal_length = np.flatnonzero(equal)
    values = [_values(column.filter(pa.array(equal))) for column in (left, right)]
    differing = np.flatnonzero(values[0] != values[1])
    ends = np.cumsum(lengths[of_equal_length])
    equal[of_equal_length[np.searchsorted(ends, differing, side="right")]] = False
    return equal


def num_bytes_of(dataset: Dataset) -> int:
    """About the bytes of a dataset in an Arrow file; of a selection of rows, their share."""
    return round(dataset.data.nbytes * len(dataset) / max(1, dataset.data.num_rows))


def positions_of(wanted: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Where in `values`, all of which differ, the wanted ones are.

    Returns:
        The positions of those that are there, and which these are, a mask of the shape of `wanted`.
    """
    order = np.argsort(values, kind="stable")
    places = np.searchsorted(values, wanted, sorter=order)
    found = places < len(values)
    found[found] = values[order[places[found]]] == wanted[found]
    return order[places[found]], found


def write_rows(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """Write tables one after the other to an Arrow file, which `Dataset.from_file` maps into memory."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for table in tables:
            writer.write_table(table.cast(schema).combine_chunks(), max_chunksize=BATCH_SIZE)


def _values(lists: pa.ChunkedArray) -> np.ndarray:
    return lists.combine_chunks().flatten().to_numpy(zero_copy_only=False)


def _joined(arrays: Iterable[np.ndarray]) -> np.ndarray:
    arrays = list(arrays)
    return np.concatenate(arrays) if arrays else np.empty(0, np.int64)
