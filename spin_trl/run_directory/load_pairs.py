"""What an iteration of a run trained on, for whoever wants to look at it. Needs the run directory alone."""

import os
from pathlib import Path

from datasets import Dataset, Features
from datasets.fingerprint import get_temporary_cache_files_directory

from ..data.columns import write_rows
from .run_paths import RunDirectoryError
from .store import IterationStore


def load_pairs(output_dir: str | Path, iteration: int) -> Dataset:
    """
    The pairs that an iteration trained on, with all their columns.

    Args:
        output_dir (`str` or `Path`): The run directory.
        iteration (`int`): Number of the iteration.

    Returns:
        [`~datasets.Dataset`] in a temporary file, which is there until the process ends. docs/run_directory.md has the
        columns that every run has; -1 in `sample` and `chosen_sample` stands for the ground truth.

    Raises:
        [`RunDirectoryError`]: if the iteration has no pairs, or they or the run's data are damaged.
    """
    store = IterationStore(output_dir)
    store.run_id = store.read_run()["run"] if store.has_run() else ""
    found = [number for number in store.iterations() if store.pairs(number).is_whole()]
    if iteration not in found:
        raise RunDirectoryError(
            f"There are no whole pairs of iteration {iteration} in {store.output_dir}. Iterations with such: {found}."
        )
    if not store.has_whole_data():
        raise RunDirectoryError(
            f"The run's data, `train_data` in {store.output_dir}, are missing or damaged. Resume the run: they are "
            "written again."
        )
    pairs = store.read_pairs(iteration)
    features = Features({name: pairs.holder_of(name).features[name] for name in pairs.column_names})
    path = Path(get_temporary_cache_files_directory(), f"pairs-{os.urandom(8).hex()}.arrow")
    write_rows(path, pairs.batches(), features.arrow_schema)
    return Dataset.from_file(str(path))
