"""What the benchmarks share: where they ran, sides timed in turn, the memory of processes, and how results are kept.

Knows nothing of what is measured.
"""

import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import psutil


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "runs" / "benchmarks"


def machine() -> str:
    """Cores, processor, memory and Python, in words."""
    memory = psutil.virtual_memory().total / 2**30
    return f"{os.cpu_count()} cores, {platform.machine()}, {memory:.0f} GiB, Python {platform.python_version()}"


def in_turn(sides: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """
    Measure every side once, then every side again, ..., so that a machine that slows down slows all of them.

    Returns:
        `dict[str, list[float]]`: of each side what its function returned, `repeats` values.
    """
    figures: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, measure in sides.items():
            figures[name].append(measure())
    return figures


def ratio(figures: dict[str, list[float]], side: str, to: str) -> float:
    """Median over the rounds of one side's figure divided by another's of the same round."""
    return statistics.median(a / b for a, b in zip(figures[side], figures[to], strict=True))


class PeakMemory:
    """
    A context that watches the resident memory of a process and all its children.

    Args:
        pid (`int`, *optional*): The process. By default this one.
        interval (`float`): Seconds between two looks.

    `start`, `peak` and `growth` are in bytes; pages that processes share count for each.
    """

    def __init__(self, pid: int | None = None, interval: float = 0.02):
        self.process = psutil.Process(pid)
        self.interval = interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self.start = self.peak = self.now()
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._done.set()
        self._thread.join()

    @property
    def growth(self) -> int:
        return self.peak - self.start

    def now(self) -> int:
        total = 0
        for process in [self.process, *self.process.children(recursive=True)]:
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                pass
        return total

    def _watch(self) -> None:
        while not self._done.is_set():
            self.peak = max(self.peak, self.now())
            time.sleep(self.interval)


def write_result(name: str, figures: dict[str, Any]) -> Path:
    """Write a benchmark's figures with machine and date to `runs/benchmarks/NAME.json`, and print where."""
    result = {"benchmark": name, "date": date.today().isoformat(), "machine": machine(), **figures}
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{result['date']}, {result['machine']}. Written to {path}")
    return path
