"""When a request that failed is tried again, and when waiting ends. Knows nothing of HTTP."""

import random
import time


_FIRST_DELAY = 0.5  # seconds, doubled up to the next
_LONGEST_DELAY = 10.0
_LONGEST_ASKED_DELAY = 60.0  # seconds; a server that asks for more is not obeyed

# Of its own: the run's random state must not depend on how often a server failed.
_jitter = random.Random()


class Attempts:
    """
    The attempts at one request.

    Args:
        budget (`float`): Seconds after the first failure for which it is tried again.
    """

    def __init__(self, budget: float):
        self.budget = budget
        self.num_failed = 0
        self.problem = ""
        self.waiting_for = "an answer"
        self._first_failure = 0.0
        self._delay = _FIRST_DELAY

    @property
    def elapsed(self) -> float:
        """Seconds since the first failure."""
        return time.monotonic() - self._first_failure if self.num_failed else 0.0

    def next_delay(self, problem: str, asked_delay: str | None = None) -> float | None:
        """
        Note a failure.

        Args:
            problem (`str`): What went wrong.
            asked_delay (`str`, *optional*): Seconds that the server asked for, as its `Retry-After`.

        Returns:
            `float`, *optional*: Seconds to wait until the next attempt; `None` if the budget is spent.
        """
        if self.num_failed == 0:
            self._first_failure = time.monotonic()
        self.num_failed += 1
        self.problem = problem
        self.waiting_for = f"another attempt after {problem}"
        left = self.budget - self.elapsed
        if left <= 0:
            return None
        # Jitter keeps requests that failed together from coming back together.
        delay = _sane_delay(asked_delay) or self._delay * _jitter.uniform(0.5, 1.0)
        self._delay = min(2 * self._delay, _LONGEST_DELAY)
        return min(delay, left)


class Progress:
    """
    Time since anything last came back in a phase of many requests.

    Args:
        timeout (`float`): Seconds without progress after which the phase is given up.
    """

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.made()

    def made(self) -> None:
        self._last = time.monotonic()

    def left(self) -> float:
        """Seconds within which something has to come."""
        return max(0.0, self._last + self.timeout - time.monotonic())


def _sane_delay(asked: str | None) -> float | None:
    try:
        seconds = float(asked)
    except (TypeError, ValueError):  # none, or a date
        return None
    return seconds if 0 < seconds <= _LONGEST_ASKED_DELAY else None
