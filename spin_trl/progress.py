"""Progress bars: one look for all, and quiet where nobody watches."""

import sys

from tqdm import tqdm


_SECONDS_BETWEEN_LINES = 10.0


def progress_bar(*args, **kwargs) -> tqdm:
    """A `tqdm` bar that leaves no line behind. Without a terminal, where each update is a line, it updates rarely."""
    if not sys.stderr.isatty():
        kwargs.setdefault("mininterval", _SECONDS_BETWEEN_LINES)
        kwargs.setdefault("maxinterval", 10 * _SECONDS_BETWEEN_LINES)
    return tqdm(*args, leave=False, **kwargs)
