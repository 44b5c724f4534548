"""Which setting of a method is the best one on the validation part. Knows nothing of how it was measured."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .methods import Setting


@dataclass(frozen=True)
class Tried:
    """
    Args:
        setting (`Setting`): What was tried.
        score (`float`, *optional*): On the validation part, after the last iteration. `None` where the loss stopped
            being a number.
    """

    setting: Setting
    score: float | None


def best(tried: Sequence[Tried], greater_is_better: bool) -> Setting:
    """
    The setting with the best score; of equal ones the first.

    Raises:
        `ValueError`: if none has a score.
    """
    scored = [t for t in tried if t.score is not None and math.isfinite(t.score)]
    if not scored:
        raise ValueError(f"None of {len(tried)} settings has a score: {[t.setting for t in tried]}.")
    choose = max if greater_is_better else min
    return choose(scored, key=lambda t: t.score).setting


def at_the_edge(setting: Setting, tried: Sequence[Tried]) -> bool:
    """Whether its learning rate is the smallest or greatest that was tried: beyond it there may be a better one."""
    rates = [t.setting["learning_rate"] for t in tried]
    return setting["learning_rate"] in (min(rates), max(rates))
