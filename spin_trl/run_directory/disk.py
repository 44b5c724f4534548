"""A disk that is full, read-only or gone: one error for all, whoever wrote. Knows nothing of what is written.

Libraries report a failed write each in their own way: the operating system and Arrow as an `OSError`, safetensors as a
`SafetensorError` without a number, PyTorch as a `RuntimeError` of its zip writer.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm


_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Free space there, or raise the quota"),
    **dict.fromkeys(
        (errno.EROFS, errno.EACCES, errno.EPERM),
        "Make it writable again (permissions, a file system mounted read-only)",
    ),
    **dict.fromkeys(
        (errno.ENOTDIR, errno.EIO, errno.ESTALE, errno.EFBIG), "See that its directory is there and its disk is sound"
    ),
}
_NUMBER_IN_TEXT = re.compile(r"\((?:os error|errno) (\d+)\)|\[(?:E|e)rrno (\d+)\]")
_TORCH_WRITER = re.compile(r"PytorchStreamWriter failed|inline_container\.cc.*(unexpected pos|file (write )?failed)")


class DiskError(OSError):
    """Something cannot be written: the message says what, how much is free there, and what to do."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """
    Around the writing of `path`, which itself removes what it leaves half-written.

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
        raise DiskError(
            number,
            f"{os.strerror(number)}: {path} could not be written. {_free(path)}. {_REMEDIES[number]}, and "
            "start the same command again: with `resume='auto'` it goes on from what is complete.",
        ) from error


def check_writable(directory: Path) -> None:
    """
    See, without writing anything, that a directory can be made and written to.

    Raises:
        `NotADirectoryError`: if it, or something that it lies below, is a file.
        `PermissionError`: if it may not be written to, or its file system is read-only.
    """
    existing = _nearest_existing(directory)
    number, problem = errno.ENOTDIR, "is no directory"
    if existing.is_dir():
        if os.access(existing, os.W_OK | os.X_OK):
            return
        number, problem = errno.EACCES, "cannot be written to (no permission, or a read-only file system)"
    raise OSError(
        number,
        f"`output_dir` is {str(directory)!r}, but {str(existing)!r} {problem}. Choose a path where a directory can be "
        "made and written to.",
    )


def free_bytes(path: Path) -> int:
    """Bytes that can still be written where `path` is or would be."""
    return shutil.disk_usage(_nearest_existing(path)).free


def readable(num_bytes: float) -> str:
    """A number of bytes as one says it: "1.50MB"."""
    return tqdm.format_sizeof(num_bytes, "B")


def _nearest_existing(path: Path) -> Path:
    return next(candidate for candidate in (path, *path.parents) if os.path.lexists(candidate))


def _number_of(error: Exception) -> int | None:
    """The operating system's number of a failed write; `None` if the error is of another kind."""
    number = getattr(error, "errno", None)
    if number is None and (found := _NUMBER_IN_TEXT.search(str(error))):
        number = int(found[1] or found[2])
    elif number is None and isinstance(error, RuntimeError) and _TORCH_WRITER.search(str(error)):
        said = (number for number in _REMEDIES if os.strerror(number) in str(error))
        number = next(said, errno.ENOSPC)  # where it does not say, its write fell short, as on a full disk
    return number if number in _REMEDIES else None


def _free(path: Path) -> str:
    try:
        return f"{readable(free_bytes(path))} are free there"
    except OSError as error:
        return f"How much is free there is not known ({error})"
