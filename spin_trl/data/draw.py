"""Fictitious play: each prompt's opponent is drawn from the last ones. Knows nothing of samplers, models and files.

SPIN plays the policy against its last iterate alone. Fictitious play (arXiv 2404.04291, published; no code was
released) draws from the `num_opponents` last ones, so that a policy that comes to prefer what it said two iterations
ago is told.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa


OPPONENT = "opponent"  # column: the number of the iteration whose opponent answered
OPPONENT_FIELD = pa.field(OPPONENT, pa.int32())


@dataclass(frozen=True)
class OpponentDraw:
    """
    Who answers which prompt of an iteration: uniform, independent of all other rows, and the same whenever it is asked.

    The iteration's own opponent is the newest of the `num_opponents` that take part, as soon as there are so many.
    """

    iteration: int
    num_opponents: int
    seed: int

    @property
    def opponents(self) -> range:
        """Numbers of the iterations whose opponents take part."""
        return range(max(0, self.iteration - self.num_opponents + 1), self.iteration + 1)

    def of_row(self, row: int) -> int:
        """Whose opponent answers a row."""
        source = repr((self.seed, self.iteration, OPPONENT, int(row))).encode()
        number = int.from_bytes(hashlib.blake2b(source, digest_size=8).digest())
        return self.opponents[number % len(self.opponents)]

    def of_rows(self, rows: np.ndarray) -> np.ndarray:
        """As [`of_row`], of shape `(len(rows),)`."""
        return np.array([self.of_row(row) for row in rows], np.int64)
