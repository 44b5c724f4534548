"""The charts of a run, by section of the page. Knows nothing of HTML, but of what each number of a run is called."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from ..evaluation.metric_names import ITERATION, label
from .charts import Axes, Series, bar_chart, format_number, line_chart, table
from .run_data import RunData, is_number
from .summary import scores_of


_SCORE_TITLES = {"nll": ("Negative log-likelihood of the held-out ground truth", "nats per token")}
_PAIRS = (  # title, unit, two sides
    ("Mean length", "tokens", "chosen_length", "rejected_length"),
    ("Sides longer than `max_length`", "", "chosen_truncated_share", "rejected_truncated_share"),
)
_STEP_CHARTS = (  # title, unit, names with their tones, percent
    ("Loss", "", {"loss": "accent"}, False),
    ("Rewards", "", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}, False),
    ("Reward margin", "", {"rewards/margins": "accent"}, False),
    ("Accuracy: chosen above rejected", "", {"rewards/accuracies": "accent"}, True),
    ("Log-probs of a whole side", "nats", {"logps/chosen": "chosen", "logps/rejected": "rejected"}, False),
)
_NOT_A_CURVE = {"epoch", "step", "total_flos", "train_runtime", "train_loss", "num_input_tokens_seen"}
_MAX_BINS = 24


def score_charts(run: RunData) -> list[Markup]:
    """Every evaluation score, of every opponent and of the final policy."""
    charts = []
    for name, values in scores_of(run).items():
        title, unit = _SCORE_TITLES.get(name, (name, ""))
        names = [label(i).removeprefix("iteration ") for i in values]
        axes = Axes(title, "after iteration", unit, x_names=names)
        charts.append(_curves(axes, {name: "accent"}, range(len(names)), [{name: value} for value in values.values()]))
    return charts


def iteration_charts(run: RunData) -> list[Markup]:
    """The numbers of `metrics.json` that differ between iterations, those that nobody has heard of included."""

    def values_of(name: str) -> list[float]:
        return [metrics[name] for metrics in run.metrics.values() if name in metrics]

    def add(title: str, unit: str, tones: dict[str, str], percent: bool = False) -> None:
        iterations = [i for i, metrics in run.metrics.items() if not metrics.keys().isdisjoint(tones)]
        axes = Axes(title, "iteration", unit, percent, x_names=[str(i) for i in iterations])
        charts.append(_curves(axes, tones, range(len(iterations)), [run.metrics[i] for i in iterations]))

    charts = []
    names = dict.fromkeys(name for metrics in run.metrics.values() for name in metrics)
    names = [name for name in names if not name.startswith(("evaluation/", "seconds_"))]
    for title, unit, *sides in _PAIRS:
        if any(any(values_of(side)) for side in sides):
            add(title, unit, dict(zip(sides, ("chosen", "rejected"), strict=True)), sides[0].endswith("_share"))
        names = [name for name in names if name not in sides]
    shares = [name for name in names if name.endswith("_share")]
    add("Shares of the opponent's answers", "", {name: str(i % 6) for i, name in enumerate(shares)}, percent=True)
    for name in names:
        if name not in shares and len(set(values_of(name))) > 1:
            add(name, "", {name: "accent"})
    return [chart for chart in charts if chart]


def step_charts(run: RunData) -> tuple[list[Markup], list[Markup]]:
    """Curves within the iterations: those that one looks at first, and all others."""
    marks = {step: f"iteration {iteration}" for iteration, step in iteration_starts(run).items()}

    def chart(title: str, unit: str, tones: dict[str, str], percent: bool = False) -> Markup:
        entries = [entry for entry in run.log if "step" in entry and not entry.keys().isdisjoint(tones)]
        return _curves(Axes(title, "step", unit, percent, marks=marks), tones, [e["step"] for e in entries], entries)

    known = _NOT_A_CURVE.union(*(tones for _, _, tones, _ in _STEP_CHARTS))
    others = [name for name in dict.fromkeys(name for entry in run.log for name in entry) if name not in known]
    first = [chart(*description) for description in _STEP_CHARTS]
    more = [chart(n, "", {n: "accent"}) for n in others if not n.startswith(("eval_", "self_play/", "train_"))]
    return [chart for chart in first if chart], [chart for chart in more if chart]


def _curves(axes: Axes, tones: dict[str, str], x: Sequence[float], rows: list[dict[str, Any]]) -> Markup:
    """A chart of those numbers, each with its tone, that the rows have."""
    series = [Series(n, [row[n] if is_number(row.get(n)) else None for row in rows], t) for n, t in tones.items()]
    return line_chart(axes, x, series)


def iteration_starts(run: RunData) -> dict[int, float]:
    """Iteration -> steps before it. The log has an entry when an iteration's pairs are made."""
    entries = [entry for entry in run.log if {ITERATION, "step", "self_play/num_pairs"} <= entry.keys()]
    return {entry[ITERATION]: entry["step"] for entry in entries if entry[ITERATION] > 0}


def length_charts(run: RunData) -> list[Markup]:
    """How long the two sides are, for each iteration, over the same bins."""
    longest = max((len(c) for counts in (run.chosen_lengths, run.rejected_lengths) for c in counts.values()), default=1)
    size = -(-longest // _MAX_BINS)
    names = [str(start) if size == 1 else f"{start}–{start + size - 1}" for start in range(0, longest, size)]
    charts = []
    for iteration, rejected in run.rejected_lengths.items():
        sides = [("chosen", run.chosen_lengths[iteration]), ("rejected", rejected)]
        series = [Series(name, _binned(counts, size, len(names)), name) for name, counts in sides if counts.sum()]
        axes = Axes(f"Lengths in iteration {iteration}", "tokens", "share of the side", percent=True, x_names=names)
        charts.append(line_chart(axes, range(len(names)), series))
    return charts


def _binned(counts: np.ndarray, size: int, num_bins: int) -> list[float]:
    padded = np.zeros(size * num_bins)
    padded[: len(counts)] = counts
    return list(padded.reshape(num_bins, size).sum(axis=1) / counts.sum())


def time_chart(run: RunData) -> Markup:
    """Seconds of each phase, by iteration."""
    names = list(dict.fromkeys(n for metrics in run.metrics.values() for n in metrics if n.startswith("seconds_")))
    iterations = [i for i, metrics in run.metrics.items() if any(name in metrics for name in names)]
    series = [
        Series(name.removeprefix("seconds_"), [run.metrics[i].get(name) for i in iterations], str(number % 6))
        for number, name in enumerate(names)
    ]
    axes = Axes("Time of each phase", "iteration", "seconds")
    return bar_chart(axes, [str(i) for i in iterations], series)


def metrics_table(run: RunData) -> Markup:
    """Every number of every `metrics.json`."""
    names = sorted({name for metrics in run.metrics.values() for name in metrics})
    rows = [
        [name, *(format_number(metrics.get(name), name.endswith("_share")) for metrics in run.metrics.values())]
        for name in names
    ]
    return table(["", *(f"iteration {iteration}" for iteration in run.metrics)], rows)
