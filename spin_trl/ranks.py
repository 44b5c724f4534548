"""Work that one or all processes do, such that an error of any of them is raised on every one, instead of a hang."""

import pickle
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object


T = TypeVar("T")


def on_main_process(function: Callable[[], T]) -> T:
    """
    Run `function` on the main process and return its result, which must be picklable, on all.

    Raises:
        Whatever `function` raises, on every process.
    """
    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        outcome = _attempt(function)
    broadcast_object_list(outcome)
    result, error = outcome
    if error is not None:
        raise error
    return result


def on_every_process(function: Callable[[], T]) -> T:
    """
    Run `function` on every process and wait for all of them.

    Raises:
        The error of the first process that has one, on every process.
    """
    result, error = _attempt(function)
    errors = [e for e in gather_object([error]) if e is not None]
    if errors:
        raise errors[0]
    return result


def _attempt(function: Callable[[], T]) -> list[Any]:
    try:
        return [function(), None]
    except Exception as error:
        if PartialState().num_processes == 1:
            return [None, error]
        error = _as_sendable(error)
        error.add_note(f"On process {PartialState().process_index}:\n{traceback.format_exc()}")
        return [None, error]


def _as_sendable(error: Exception) -> Exception:
    """The error itself if it can go to another process, else one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever an exception class of somebody else's does when pickled
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
