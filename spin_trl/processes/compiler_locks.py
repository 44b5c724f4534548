"""Locks that a killed compilation has left behind, for which DeepSpeed would wait without a word, forever.

DeepSpeed compiles an operator when it first needs it, through torch's cache of extensions. Knows nothing of training.
"""

import os
import time
from pathlib import Path

from accelerate import PartialState
from accelerate.logging import get_logger


logger = get_logger(__name__)

_MAX_AGE = 300.0  # seconds; compiling one operator takes a minute or two


def warn_of_old_locks() -> None:
    """Name each lock that is older than a few minutes, once on each machine."""
    for lock, age in _old_locks() if PartialState().is_local_main_process else []:
        logger.warning(
            f"The lock {lock} of torch's extension cache is {age / 60:.0f} minutes old. If no compilation is running "
            "on this machine, one that was killed has left it, and DeepSpeed will wait for it forever: stop this run, "
            f"delete the file (`rm {lock}`) and start again.",
            main_process_only=False,
        )


def _old_locks() -> list[tuple[Path, float]]:
    """Locks and their ages in seconds."""
    from torch.utils.cpp_extension import get_default_build_root  # needs setuptools, as compiling does

    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    # By default there is a folder for each version of Python and CUDA between.
    locks = Path(folder).glob("*/lock") if folder else Path(get_default_build_root()).glob("*/*/lock")
    ages = []
    for lock in sorted(locks):
        try:
            ages.append((lock, time.time() - lock.stat().st_mtime))
        except FileNotFoundError:  # its compilation has just ended
            continue
    return [(lock, age) for lock, age in ages if age > _MAX_AGE]
