"""The initial policy's answers, kept with the run: one for each row and sample. Knows nothing of models and losses.

They are what the first opponent generated. Their parts are read in turn and may be deleted, so they are kept as rows of
an Arrow file, which pairs are joined with when they are read, as they are with the run's data.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ..data.columns import numbers, positions_of
from ..data.pair_dataset import PairDataset
from ..objectives.third_side import INITIAL_IDS
from .arrow_directory import arrow_metadata, is_whole_arrow, read_arrow, write_arrow
from .completion_parts import CompletionParts
from .run_paths import RunDirectoryError


_SCHEMA = pa.schema([("row", pa.int64()), ("sample", pa.int32()), (INITIAL_IDS, pa.list_(pa.int32()))])


class InitialAnswers:
    """
    Args:
        path (`Path`): The directory that holds them, or is to.
        parts ([`CompletionParts`]): What the first opponent generated.
        run_id (`str`): The run, written into what is kept.
    """

    def __init__(self, path: Path, parts: CompletionParts, run_id: str):
        self.path = path
        self.parts = parts
        self.run_id = run_id

    @property
    def are_kept(self) -> bool:
        return self.path.is_dir()

    def keep(self) -> None:
        """Write them, in place of what an earlier start wrote."""
        schema = _SCHEMA.with_metadata({"run": self.run_id})
        write_arrow(self.path, self._tables(), schema, num_bytes=2 * self.parts.num_bytes())  # they are compressed

    def restore(self, num_answers: int) -> None:
        """
        Make sure that they are there, in a run that goes on: from what the first opponent generated, if they are not.

        Args:
            num_answers (`int`): How many there have to be.

        Raises:
            [`RunDirectoryError`]: if that is not there either. The policy that gave them is gone.
        """
        if is_whole_arrow(self.path) and arrow_metadata(self.path).get(b"run") == self.run_id.encode():
            return
        try:
            found = self._num_answers()
        except RunDirectoryError as error:
            raise self._lost(str(error)) from error
        if found != num_answers:
            raise self._lost(f"{self.parts.directory} has {found} of the {num_answers} answers.")
        self.keep()

    def join(self, pairs: PairDataset) -> PairDataset:
        """
        Give every pair the initial answer of its row and sample, as `initial_ids`.

        Raises:
            [`RunDirectoryError`]: if a pair has none.
        """
        answers = read_arrow(self.path)
        num_samples = 1 + max(int(numbers(dataset, "sample").max(initial=0)) for dataset in (answers, pairs.answers))
        wanted = _keys(pairs.answers, num_samples)
        positions, found = positions_of(wanted, _keys(answers, num_samples))
        if not found.all():
            row, sample = divmod(int(wanted[~found][0]), num_samples)
            raise RunDirectoryError(
                f"{self.path} has no answer of the initial policy for row {row}, sample {sample}, which a pair is of: "
                "the two are not of the same run. Play it again with `overwrite_output_dir=True`."
            )
        return PairDataset(pairs.truths, pairs.answers, answers.select_columns([INITIAL_IDS]).select(positions))

    def _num_answers(self) -> int:
        keys = [np.empty((2, 0), np.int64)]
        keys += [np.stack([batch[name].to_numpy() for name in ("row", "sample")]) for batch in self.parts.batches()]
        return np.unique(np.concatenate(keys, axis=1), axis=1).shape[1]

    def _tables(self) -> Iterator[pa.Table]:
        for batch in self.parts.batches():
            yield batch.select(["row", "sample", "completion_ids"]).rename_columns(_SCHEMA.names)

    def _lost(self, problem: str) -> RunDirectoryError:
        return RunDirectoryError(
            f"`loss_type` compares with what the initial policy answered, but {self.path} is missing or "
            f"damaged, and so is what it is made from: {problem} The policy that gave these answers is gone. Bring "
            "back one of the two directories, or play the run again with `overwrite_output_dir=True`."
        )


def _keys(dataset: Dataset, num_samples: int) -> np.ndarray:
    return numbers(dataset, "row") * num_samples + numbers(dataset, "sample")
