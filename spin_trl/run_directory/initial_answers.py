"""The initial policy's answers, kept with the run: one for each row and sample. Knows nothing of models and losses.

They are what the first opponent generated. Its parts are read in turn and may be deleted, so the answers are kept as
Arrow rows, which pairs are joined with when they are read, as they are with the run's data.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

from ..data.columns import numbers, positions_of
from ..data.pair_dataset import PairDataset
from ..objectives.third_side import INITIAL_IDS
from .arrow_directory import ArrowDirectory
from .completion_parts import CompletionParts
from .run_paths import RunDirectoryError


_SCHEMA = pa.schema([("row", pa.int64()), ("sample", pa.int32()), (INITIAL_IDS, pa.list_(pa.int32()))])


@dataclass(frozen=True)
class InitialAnswers:
    """They are kept in `rows`, and made from `parts`, what the first opponent generated."""

    rows: ArrowDirectory
    parts: CompletionParts

    def keep(self) -> None:
        """Write them, in place of what an earlier start wrote."""
        batches = (batch.select(["row", "sample", "completion_ids"]) for batch in self.parts.batches())
        self.rows.write((batch.rename_columns(_SCHEMA.names) for batch in batches), _SCHEMA)

    def restore(self, num_rows: int) -> None:
        """
        Make sure that they are there, in a run that goes on, whose first opponent has answered so many prompts.

        Raises:
            [`RunDirectoryError`]: if they are not, and cannot be made again.
        """
        if self.rows.is_whole():
            return
        found = len(self.parts.completed_rows())
        if found < num_rows:
            raise RunDirectoryError(
                f"`loss_type` compares with what the initial policy answered, but {self.rows.path} is missing or "
                f"damaged, and {self.parts.directory}, from which it is made, has whole answers to {found} of the "
                f"{num_rows} prompts. The policy that gave them is gone. Bring back one of the two directories, or "
                "play the run again with `overwrite_output_dir=True`."
            )
        self.keep()

    def join(self, pairs: PairDataset) -> PairDataset:
        """
        Give every pair the initial answer of its row and sample, as `initial_ids`.

        Raises:
            [`RunDirectoryError`]: if a pair has none.
        """
        answers = self.rows.read()
        wanted, kept = (_keys(numbers(rows, "row"), numbers(rows, "sample")) for rows in (pairs.answers, answers))
        positions, found = positions_of(wanted, kept)
        if not found.all():
            row, sample = divmod(int(wanted[~found][0]), 2**31)
            raise RunDirectoryError(
                f"{self.rows.path} has no answer of the initial policy for row {row}, sample {sample}, which a pair is "
                "of: the two are not of the same run. Play it again with `overwrite_output_dir=True`."
            )
        return PairDataset(pairs.truths, pairs.answers, answers.select_columns([INITIAL_IDS]).select(positions))


def _keys(rows: ArrayLike, samples: ArrayLike) -> np.ndarray:
    """One number for each answer, in the order of rows and samples."""
    return np.asarray(rows) * 2**31 + np.asarray(samples)
