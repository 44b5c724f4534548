"""Paths of a run directory, none of which leads out of it. Knows nothing of what lies there."""

import os
import re
from pathlib import Path


_NUMBERED = re.compile(r"(iteration|checkpoint)-(0|[1-9][0-9]*)")  # as a run names them: no "-01", no "-²"


class RunDirectoryError(RuntimeError):
    """The run directory cannot be used: the message says what was found, what was expected and what to do."""


def own_path(directory: Path, *names: str) -> Path:
    """
    A path in a run directory, none of whose parts is a link: what lies elsewhere is somebody else's.

    Raises:
        [`RunDirectoryError`]: if a link leads out of the run directory on the way.
    """
    path = directory
    for name in names:
        path = path / name
        if path.is_symlink():
            raise RunDirectoryError(
                f"{path} is a link to {os.readlink(path)}, but a run reads and writes its own files only. Remove "
                "the link; to keep a run elsewhere, make `output_dir` itself the link."
            )
    return path


def is_numbered(path: Path) -> bool:
    """Whether a path is named like an iteration or a checkpoint."""
    return _NUMBERED.fullmatch(path.name) is not None


def numbered(directory: Path, kind: str) -> dict[int, Path]:
    """Directories of a kind ("iteration", "checkpoint") by number, ascending. A link is none: it may lead anywhere."""
    found = [path for path in directory.glob(f"{kind}-*") if is_numbered(path)]
    own = [path for path in found if path.is_dir() and not path.is_symlink()]
    return dict(sorted((int(path.name.partition("-")[2]), path) for path in own))
