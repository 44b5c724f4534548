"""Reward functions, as TRL's GRPOTrainer takes them: called, their values checked, weighted and summed.

Knows nothing of files, pairs and tokenizers.
"""

import asyncio
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from inspect import isawaitable
from numbers import Real
from typing import Any

import numpy as np
from trl.trainer.utils import get_callable_name, start_event_loop_in_daemon


# (prompts, completions, completion_ids=..., **columns) -> one reward each; asynchronous functions too
RewardFunction = Callable[..., Sequence[float | None]]

# Keywords of the call that no column of the data can have.
RESERVED_KEYWORDS = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}

_REMEDY = "Correct the function and start the same command again: completions that are there are kept."


class RewardFunctions:
    """
    The reward functions of a run. A completion's reward is the weighted sum of what the functions say of it; one that
    says `None` of it does not count, as in GRPO. One of which all say so has no reward. By default each function weighs
    1.0. One that is there twice has a number behind its name in `names`.
    """

    def __init__(self, functions: Sequence[RewardFunction], weights: Sequence[float] | None = None):
        self.functions = list(functions)
        self.weights = np.ones(len(functions)) if weights is None else np.asarray(weights, np.float64)
        names = [get_callable_name(function) for function in functions]
        earlier = [names[:i].count(name) for i, name in enumerate(names)]
        self.names = [f"{name}_{count + 1}" if count else name for name, count in zip(names, earlier, strict=True)]
        self._logged: dict[str, list[float]] = defaultdict(list)

    def __call__(
        self, prompts: list, completions: list, completion_ids: list[list[int]], **columns: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """
        Have all functions judge these completions, which with their prompts are text or lists of messages. `columns`
        are further keyword arguments of the functions.

        Returns:
            The rewards, of shape `(len(prompts),)`, not-a-number where there is none, and what each function said, of
            shape `(len(prompts), len(functions))`, not-a-number where it said `None`.

        Raises:
            Whatever a function raises, with its name added.
            `TypeError`, `ValueError`: if a function returns anything but one finite number or `None` for each
                completion, or the weighted sum is no finite number.
        """
        arguments = {
            "prompts": prompts,
            "completions": completions,
            "completion_ids": completion_ids,
            "log_extra": lambda *args, **kwargs: None,  # there is no table of completions to add columns to
            "log_metric": lambda name, value: self._logged[name].append(float(value)),
            **columns,
        }
        said = zip(self._call_all(arguments), self.names, strict=True)
        each = np.stack([_checked(values, name, len(prompts)) for values, name in said], axis=1)
        rewards = np.where(np.isnan(each).all(axis=1), np.nan, np.nansum(each * self.weights, axis=1))
        if np.isinf(rewards).any():
            raise ValueError(
                f"The weighted sum of the rewards {each[np.isinf(rewards)][0].tolist()} ({', '.join(self.names)}) is "
                "no finite number. Let the functions return smaller ones, or lower `reward_weights`."
            )
        return rewards, each

    def take_logged(self) -> dict[str, float]:
        """The means of what functions have passed to `log_metric` since the last call."""
        logged = {f"rewards/{name}": float(np.mean(values)) for name, values in self._logged.items()}
        self._logged.clear()
        return logged

    def _call_all(self, arguments: dict[str, Any]) -> list[Any]:
        """One function after the other; asynchronous ones wait for their answers together."""

        values = []
        for function, name in zip(self.functions, self.names, strict=True):
            with _naming(name):
                values.append(function(**arguments))

        async def wait(value: Any, name: str) -> Any:
            with _naming(name):
                return await value if isawaitable(value) else value

        async def wait_for_all() -> list[Any]:
            return await asyncio.gather(*map(wait, values, self.names))

        if any(map(isawaitable, values)):
            values = asyncio.run_coroutine_threadsafe(wait_for_all(), self._event_loop).result()
        return values

    @cached_property
    def _event_loop(self) -> asyncio.AbstractEventLoop:
        """One loop for all calls, which clients that functions keep can stay connected in; a notebook has its own."""
        _, loop, is_ready = start_event_loop_in_daemon("reward functions")
        is_ready.wait()
        return loop


def check_rewards(reward_funcs: Any, pairing: str, weights: list[float] | None) -> RewardFunctions | None:
    """
    The reward functions that the user has passed, if any. `TypeError` if one of them is no function, `ValueError` if
    the pairing needs some and there are none, or there are not as many as weights.
    """
    functions = [reward_funcs] if reward_funcs is not None else []
    if isinstance(reward_funcs, list | tuple):
        functions = list(reward_funcs)
    for function in functions:
        is_model = isinstance(function, str) or hasattr(function, "parameters")
        if is_model or isinstance(function, type) or not callable(function):
            remedy = "Pass one that takes `prompts`, `completions` and `**kwargs` and returns a list of numbers."
            if is_model:
                remedy = (
                    "A reward model has to be called by a function of yours: load it once, and return "
                    "`model(**tokenizer(...)).logits[:, 0].tolist()` from `reward(prompts, completions, **kwargs)`."
                )
            raise TypeError(
                f"`reward_funcs` must be a function or a list of functions, got {_shown(function)} "
                f"(`{type(function).__name__}`). {remedy}"
            )
    if not functions and pairing != "ground_truth":
        raise ValueError(
            f"`pairing={pairing!r}` chooses by rewards, but no `reward_funcs` are given. Pass a function to "
            "`SPINTrainer(reward_funcs=...)` (`--reward_funcs file.py:function` in the shell), or leave `pairing` "
            "unset."
        )
    if weights is not None and len(weights) != len(functions):
        raise ValueError(
            f"`reward_weights` has {len(weights)} value(s) ({weights}), but there are {len(functions)} `reward_funcs`. "
            "Give one weight for each function, or leave `reward_weights` unset to weigh all alike."
        )
    return RewardFunctions(functions, weights) if functions else None


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f"In the reward function `{name}`. {_REMEDY}")
        raise


def _checked(values: Any, name: str, count: int) -> np.ndarray:
    """What a function returned as numbers, of shape `(count,)`; not-a-number for `None`."""
    values = values.tolist() if hasattr(values, "tolist") else values  # an array or a tensor
    if not isinstance(values, list | tuple):
        raise TypeError(
            f"The reward function `{name}` returned {_shown(values)} (`{type(values).__name__}`), but expected is a "
            f"list with a number for each of the {count} completions. {_REMEDY}"
        )
    if len(values) != count:
        raise ValueError(
            f"The reward function `{name}` returned {len(values)} rewards for {count} completions. It has to return "
            f"one for each, in their order; None where it does not apply. {_REMEDY}"
        )
    values = [value.item() if getattr(value, "ndim", None) == 0 else value for value in values]
    for position, value in enumerate(values):
        if value is not None and not (isinstance(value, Real) and math.isfinite(value)):
            raise ValueError(
                f"The reward function `{name}` returned {_shown(value)} for completion {position} of its list, which "
                f"is no finite number. Return a number, or None where it does not apply. {_REMEDY}"
            )
    return np.array(values, np.float64)  # `None` becomes not-a-number


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
