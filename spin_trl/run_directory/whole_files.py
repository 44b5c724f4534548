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
from io import BytesIO
from pathlib import Path
from typing import Any

from .disk import writing


_digest = partial(hashlib.blake2b, digest_size=8)  # bytes


def temporary_path(path: Path, shared: bool = False) -> Path:
    """Where `path` is written before it is whole: by this process, or, if `shared`, by all of a run's together."""
    return path.with_name(f"{path.name}.tmp-{'all' if shared else os.getpid()}")


def is_temporary(path: Path) -> bool:
    """Whether a path is left over from a write that was cut short."""
    return re.search(r"\.tmp-(\d+|all)$", path.name) is not None


def make_directory(path: Path) -> None:
    """Make a directory and those above it, where they are not there yet."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from error


def write_whole(path: Path, write: Callable[[Path], Any], is_main_process: bool | None = None) -> None:
    """
    Have `write(temporary path)` make a file or a directory, and give it the name `path`, in place of one that is there.

    Args:
        is_main_process (`bool`, *optional*): Where all processes call this, and write together: whether this is the
            one that gives the name. By default this process writes alone.

    Raises:
        [`DiskError`]: if the disk does not take it. Nothing is left of it then.
    """
    temporary = temporary_path(path, shared=is_main_process is not None)
    with writing(path):
        if is_main_process is False:
            write(temporary)
            return
        make_directory(path.parent)
        remove(temporary)
        try:
            write(temporary)
            flush(temporary)
            if path.is_dir() and temporary.is_dir():  # a file takes no directory's place
                replaced = temporary_path(path.with_name(f"{path.name}.replaced"))
                path.rename(replaced)
                temporary.rename(path)
                remove(replaced)
            else:
                temporary.rename(path)
        finally:
            remove(temporary)
        _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file; see [`write_whole`]."""
    write_whole(path, lambda temporary: temporary.write_text(text))


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON; see [`write_whole`]."""
    write_text(path, to_json(value))


def to_json(value: Any) -> str:
    """A value as the run directory's JSON files hold it."""
    return json.dumps(value, indent=2, default=str) + "\n"


def flush(path: Path) -> None:
    """Have the disk take a file, or all that lies in a directory, now."""
    for directory, _, names in os.walk(path):
        for name in names:
            _sync(Path(directory, name))
        _sync(Path(directory))
    if path.is_file():
        _sync(path)


def checksum(content: Path | bytes) -> str:
    """Checksum of a file, or of what is to be in one: 16 hexadecimal digits."""
    with content.open("rb") if isinstance(content, Path) else BytesIO(content) as file:
        return hashlib.file_digest(file, _digest).hexdigest()


def remove(path: Path) -> None:
    """Delete a file, a directory or a link (never what it points to). Nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):  # to unlink what is not there is an error on a disk that went read-only
        path.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
