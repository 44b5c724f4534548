"""A disk that is full, read-only or gone: one error for all, whoever wrote. Knows nothing of what is written.

Libraries report a failed write each in their own way: the operating system and Arrow as an `OSError`, safetensors as a
`SafetensorError` without a number, PyTorch as a `RuntimeError` of its zip writer.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


_FULL = (errno.ENOSPC, errno.EDQUOT)
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)
_ABSENT = (errno.ENOTDIR, errno.EIO, errno.ESTALE, errno.EFBIG)

_NUMBER_IN_TEXT = re.compile(r"\((?:os error|errno) (\d+)\)|\[(?:E|e)rrno (\d+)\]")
_TORCH_WRITER = re.compile(r"PytorchStreamWriter failed|inline_container\.cc.*(unexpected pos|file (write )?failed)")


class DiskError(OSError):
    """Something cannot be written: the message says what, how much is needed and free, and what to do."""


@contextmanager
def writing(path: Path, num_bytes: int | Callable[[], int] | None = None) -> Iterator[None]:
    """
    Around a write, which itself removes what it leaves half-written.

    Args:
        path (`Path`): What is being written.
        num_bytes (`int` or `Callable[[], int]`, *optional*): Bytes that it needs, where known.

    Raises:
        [`DiskError`]: in place of a library's own error, if the disk is the cause.
    """
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        number = _number_of(error)
        if number is None:
            raise
        num_bytes = num_bytes() if callable(num_bytes) else num_bytes
        raise DiskError(number, _explanation(path, number, num_bytes)) from error


def check_writable(directory: Path) -> None:
    """
    See, without writing anything, that a directory can be made and written to.

    Raises:
        `NotADirectoryError`: if it, or something that it lies below, is a file.
        `PermissionError`: if it may not be written to, or its file system is read-only.
    """
    existing = _nearest_existing(directory)
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


def free_bytes(path: Path) -> int:
    """Bytes that can still be written where `path` is or would be."""
    return shutil.disk_usage(_nearest_existing(path)).free


def readable(num_bytes: float) -> str:
    """A number of bytes as one says it: "1.5 GB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def _nearest_existing(path: Path) -> Path:
    return next(candidate for candidate in (path, *path.parents) if os.path.lexists(candidate))


def _number_of(error: Exception) -> int | None:
    """The operating system's number of a failed write; `None` if the error is of another kind."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in (*_FULL, *_CLOSED, *_ABSENT) else None
    found = _NUMBER_IN_TEXT.search(str(error))
    if found is not None:
        number = int(found[1] or found[2])
        return number if number in (*_FULL, *_CLOSED, *_ABSENT) else None
    if isinstance(error, RuntimeError) and _TORCH_WRITER.search(str(error)):
        said = (number for number in (*_CLOSED, *_ABSENT) if os.strerror(number) in str(error))
        return next(said, errno.ENOSPC)  # where it does not say, its write fell short, as on a full disk
    return None


def _explanation(path: Path, number: int, num_bytes: int | None) -> str:
    needed = "an amount that is not known" if num_bytes is None else readable(num_bytes)
    if number in _FULL:
        remedy = "Free space there, or raise the quota"
    elif number in _CLOSED:
        remedy = "Make it writable again (permissions, a file system mounted read-only)"
    else:
        remedy = "See that its directory is there and its disk is sound"
    return (
        f"{os.strerror(number)}: {path} could not be written. It needs {needed}, and {_free(path)} free there. "
        f"{remedy}, and start the same command again: with `resume='auto'` it goes on from what is complete."
    )


def _free(path: Path) -> str:
    try:
        return f"{readable(free_bytes(path))} are"
    except OSError as error:
        return f"it is not known how much is ({error})"
