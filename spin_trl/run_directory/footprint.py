"""Whether the weights that a run will write fit on its disk, asked before it begins. Knows nothing of models.

Counted are opponents and checkpoints, as a run holds them at once that plays to its end, with two moments of the
optimizer for each number that is trained (AdamW's). Completions and pairs, a few bytes a token, come on top.
"""

import errno
import logging
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm
from transformers.trainer_utils import SaveStrategy

from ..spin_config import SPINConfig
from .disk import DiskError, free_bytes, readable


logger = logging.getLogger(__name__)

_CLOSE = 0.9  # of the free space


@dataclass(frozen=True)
class WeightSizes:
    """Bytes of the policy's numbers on disk."""

    saved: int  # in a checkpoint: the adapter's, or the model's
    trained: int
    opponent: int
    base: int


def check_footprint(args: SPINConfig, sizes: WeightSizes, num_opponents: int, writes_base: bool) -> None:
    """
    Log what a run will write beside what is free, and warn if that is close.

    Args:
        num_opponents (`int`): How many are saved.
        writes_base (`bool`): Whether a base model is written for the server.

    Raises:
        [`DiskError`]: if even the weights alone, without moments, do not fit.
    """
    directory = Path(args.output_dir).absolute()
    num_checkpoints = 0 if args.save_strategy == SaveStrategy.NO else args.num_iterations  # each ends in one
    if (args.save_total_limit or 0) > 0:
        num_checkpoints = min(num_checkpoints, args.save_total_limit + 1)  # a new one is whole before an old one goes
    opponents = num_opponents * sizes.opponent + (sizes.base if writes_base else 0)
    checkpoints = num_checkpoints * (sizes.saved + (0 if args.save_only_model else 2 * sizes.trained))
    without_moments = opponents + num_checkpoints * sizes.saved
    # What lies there already counts as written, or is deleted first.
    free, present = free_bytes(directory), _size_of_run(directory)
    message = (
        f"The run writes about {readable(opponents + checkpoints)} of weights (opponents {readable(opponents)}, "
        f"checkpoints {readable(checkpoints)}) to {directory}, where {readable(free)} are free."
    )
    remedy = (
        "Free space, choose another `output_dir`, set `save_total_limit` or `save_only_model`, or train an adapter."
    )
    if without_moments - present > free and args.max_steps <= 0:
        raise DiskError(errno.ENOSPC, f"{message} Without moments it needs {readable(without_moments)}. {remedy}")
    if opponents + checkpoints - present > _CLOSE * free:
        logger.warning(f"{message} That may not be enough. {remedy}")
    else:
        tqdm.write(message)


def _size_of_run(directory: Path) -> int:
    """Bytes of the iterations and checkpoints that lie in a run directory."""
    found = [path for name in ("iteration-*", "checkpoint-*") for path in directory.glob(f"{name}/**/*")]
    return sum(path.stat().st_size for path in found if path.is_file() and not path.is_symlink())
