"""When a failed request is tried again."""

import random
import time

import pytest

from spin_trl.generation.vllm.attempts import Attempts, Progress


def test_delays_double_up_to_ten_seconds_and_vary_downwards_by_at_most_half():
    """0.5, 1, 2, 4, 8, then 10 for ever."""
    attempts = Attempts(budget=10_000)
    delays = [attempts.next_delay("busy") for _ in range(7)]
    for delay, longest in zip(delays, [0.5, 1, 2, 4, 8, 10, 10], strict=True):
        assert longest / 2 <= delay <= longest
    assert attempts.num_failed == 7


def test_requests_that_fail_together_do_not_come_back_together():
    assert len({Attempts(budget=100).next_delay("busy") for _ in range(20)}) == 20


def test_run_is_as_random_as_if_nothing_had_failed():
    random.seed(0)
    expected = random.random()
    random.seed(0)
    Attempts(budget=100).next_delay("busy")
    assert random.random() == expected


@pytest.mark.parametrize("asked", ["7", "7.0", " 7 "])
def test_delay_that_the_server_asks_for_is_kept(asked):
    assert Attempts(budget=100).next_delay("HTTP 429", asked) == 7


@pytest.mark.parametrize("asked", [None, "", "-5", "0", "nan", "3600", "Wed, 21 Oct 2026 07:28:00 GMT"])
def test_delay_without_sense_is_not_kept(asked):
    assert 0.25 <= Attempts(budget=10_000).next_delay("HTTP 429", asked) <= 0.5


def test_last_attempt_is_made_when_the_budget_ends_and_none_after_it(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    attempts = Attempts(budget=30)
    attempts.next_delay("down", asked_delay="20")
    now += 20
    assert attempts.next_delay("down", asked_delay="20") == 10
    now += 10
    assert attempts.next_delay("still down") is None
    assert (attempts.num_failed, attempts.elapsed, attempts.problem) == (3, 30, "still down")


def test_budget_begins_with_the_first_failure(monkeypatch):
    """An answer that took long before its connection broke has not used any of it."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    attempts = Attempts(budget=30)
    now += 500
    assert attempts.next_delay("connection lost") is not None


def test_time_without_progress_is_counted_from_the_last(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    progress = Progress(timeout=60)
    now += 50
    assert progress.left() == 10
    progress.made()
    now += 50
    assert progress.left() == 10
    now += 50
    assert progress.left() == 0
