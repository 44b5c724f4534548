"""The scores by iteration as one picture: a panel for each task, a line for each method."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # without pyplot: no window, no state


_COLOURS = ("#6b6b6b", "#0b6a6a", "#3f4fb0", "#ad4a17", "#8a2f7d", "#5b8a1a")
_MARKERS = "soD^vP"


@dataclass(frozen=True)
class Panel:
    """
    Args:
        title, score_name (`str`): Of the task.
        start (`float`): Of the model that all start from.
        lines (`dict[str, list[list[float]]]`): Of each method, for each seed, after each iteration.
    """

    title: str
    score_name: str
    start: float
    lines: dict[str, list[list[float]]]


def draw(panels: Sequence[Panel], titles: Sequence[str], path: Path) -> None:
    """
    Write a PNG file.

    Args:
        titles (`Sequence[str]`): Of all methods, so that each has its colour in every panel.
    """
    figure = Figure(figsize=(4.4 * len(panels), 3.8), layout="constrained", dpi=144, facecolor="white")
    for number, panel in enumerate(panels, 1):
        _draw_panel(figure.add_subplot(1, len(panels), number), panel, titles)
    handles = {}
    for axes in figure.axes:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, metadata={"Software": None})


def _draw_panel(axes, panel: Panel, titles: Sequence[str]) -> None:
    for title, seeds in panel.lines.items():
        which = list(titles).index(title)
        values = np.array([[panel.start, *one] for one in seeds])  # (seeds, 1 + iterations)
        places = np.arange(values.shape[1]) + 0.04 * (which - len(titles) / 2)  # beside each other
        deviations = values.std(axis=0, ddof=1) if len(values) > 1 else None
        style = {"color": _COLOURS[which % len(_COLOURS)], "marker": _MARKERS[which % len(_MARKERS)]}
        axes.errorbar(places, values.mean(axis=0), deviations, label=title, **style, markersize=4, capsize=2, lw=1.2)
    num_iterations = max(len(one) for seeds in panel.lines.values() for one in seeds)
    axes.set_xticks(range(num_iterations + 1), ["start", *(str(i) for i in range(num_iterations))])
    axes.set(title=panel.title, xlabel="after iteration", ylabel=panel.score_name)
    axes.grid(alpha=0.3)
    _widen(axes, abs(panel.start) / 10)


def _widen(axes, height: float) -> None:
    """Show at least `height`, so that noise around the start does not fill a panel."""
    low, high = axes.get_ylim()
    missing = max(height - (high - low), 0) / 2
    axes.set_ylim(low - missing, high + missing)
