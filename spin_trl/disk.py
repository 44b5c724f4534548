"""Whether a run directory can be written to. Knows nothing of what a run writes."""

import os
from pathlib import Path


def check_writable(directory: Path) -> None:
    """
    See, without writing anything, that a directory can be made and written to.

    Raises:
        `NotADirectoryError`: if it, or something that it lies below, is a file.
        `PermissionError`: if it may not be written to, or its file system is read-only.
    """
    existing = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise NotADirectoryError(
            f"`output_dir` is {str(directory)!r}, but {str(existing)!r} is no directory. Choose a path where a "
            "directory is or can be made."
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(
            f"`output_dir` is {str(directory)!r}, but {str(existing)!r} cannot be written to (no permission, or a "
            "read-only file system). Choose a directory that can."
        )
