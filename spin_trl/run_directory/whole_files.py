"""Files and directories that are whole as soon as they carry their name. Knows nothing of what is in them.

What is written goes to a temporary name beside its own, is flushed to the disk, and renamed.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from .disk import writing


_TEMPORARY = ".tmp"
_digest = partial(hashlib.blake2b, digest_size=8)  # bytes


def temporary_path(path: Path, shared: bool = False) -> Path:
    """Where `path` is written before it is whole: by this process, or, if `shared`, by all of a run's together."""
    return path.with_name(f"{path.name}{_TEMPORARY}-{'all' if shared else os.getpid()}")


def is_temporary(path: Path) -> bool:
    """Whether a path is left over from a write that was cut short."""
    return re.search(rf"{re.escape(_TEMPORARY)}-(\d+|all)$", path.name) is not None


def make_directory(path: Path) -> None:
    """Make a directory and those above it, where they are not there yet."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from error


def write_file(path: Path, write: Callable[[Path], Any], num_bytes: int | None = None) -> None:
    """
    Have `write(temporary path)` make a file, and give it the name `path`.

    Args:
        num_bytes (`int`, *optional*): The file's size, where known, for the error.

    Raises:
        [`DiskError`]: if the disk does not take it. Nothing is left of it then.
    """
    temporary = temporary_path(path)
    with writing(path, num_bytes):
        make_directory(path.parent)
        try:
            write(temporary)
            _flush(temporary)
            temporary.rename(path)
        finally:
            _remove_if_there(temporary)
        _flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file; see [`write_file`]."""
    write_file(path, lambda temporary: temporary.write_text(text), num_bytes=len(text.encode()))


def to_json(value: Any) -> str:
    """A value as the run directory's JSON files hold it."""
    return json.dumps(value, indent=2, default=str) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON; see [`write_file`]."""
    write_text(path, to_json(value))


def flush_directory(path: Path) -> None:
    """Have the disk take all that lies in a directory now."""
    for directory, _, names in os.walk(path):
        for name in names:
            _flush(Path(directory, name))
        _flush(Path(directory))


def finish_directory(temporary: Path, path: Path) -> None:
    """Give a directory that is fully written the name `path`, in place of what is there."""
    flush_directory(temporary)
    if path.exists():
        replaced = path.with_name(f"{path.name}.replaced{_TEMPORARY}-{os.getpid()}")
        path.rename(replaced)
        temporary.rename(path)
        remove(replaced)
    else:
        temporary.rename(path)
    _flush(path.parent)


def write_directory(path: Path, write: Callable[[Path], Any], num_bytes: int | None = None) -> None:
    """Have `write(temporary path)` make a directory, and give it the name `path`; see [`write_file`]."""
    temporary = temporary_path(path)
    with writing(path, num_bytes):
        make_directory(path.parent)
        try:
            write(temporary)
            finish_directory(temporary, path)
        finally:
            _remove_if_there(temporary)


def checksum(file: Path) -> str:
    """Checksum of a file's content: 16 hexadecimal digits."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, _digest).hexdigest()


def checksum_of(content: bytes) -> str:
    """What `checksum` gives for a file with this content."""
    return _digest(content).hexdigest()


def remove(path: Path) -> None:
    """Delete a file, a directory or a link (never what it points to). Nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_if_there(temporary: Path) -> None:
    if os.path.lexists(temporary):  # on a disk that went read-only the error to show is the write's
        remove(temporary)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
