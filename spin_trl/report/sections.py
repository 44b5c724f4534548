"""The charts of a run, by section of the page. Knows nothing of HTML, but of what each number of a run is called."""

from typing import Any

import numpy as np
from markupsafe import Markup

from ..evaluation.metric_names import ITERATION, label
from .charts import Axes, Series, bar_chart, format_number, line_chart, table
from .run_data import RunData
from .summary import scores_of


_SCORE_TITLES = {"nll": ("Negative log-likelihood of the held-out ground truth", "nats per token")}
_PAIRS = {  # chart -> its two sides
    "length": ("Mean length", "tokens", "chosen_length", "rejected_length"),
    "truncated": ("Sides longer than `max_length`", "", "chosen_truncated_share", "rejected_truncated_share"),
}
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
        iterations = sorted(values)
        axes = Axes(title, "after iteration", unit, x_names=[label(i).removeprefix("iteration ") for i in iterations])
        series = Series(name, [values[i] for i in iterations])
        charts.append(line_chart(axes, range(len(iterations)), [series]))
    return charts


def iteration_charts(run: RunData) -> list[Markup]:
    """The numbers of `metrics.json` that differ between iterations, those that nobody has heard of included."""
    names = list(dict.fromkeys(name for metrics in run.metrics.values() for name in metrics))
    names = [name for name in names if not name.startswith(("evaluation/", "seconds_"))]
    charts = []
    for title, unit, chosen, rejected in _PAIRS.values():
        sides = {chosen: "chosen", rejected: "rejected"}
        if any(value for name in sides for value in _values(run, name).values()):
            charts.append(_by_iteration(run, title, unit, sides, chosen.endswith("_share")))
        names = [name for name in names if name not in sides]
    shares = {name: str(number % 6) for number, name in enumerate(n for n in names if n.endswith("_share"))}
    if shares:
        charts.append(_by_iteration(run, "Shares of the opponent's answers", "", shares, True))
    for name in names:
        if name not in shares and len(set(_values(run, name).values())) > 1:
            charts.append(_by_iteration(run, name, "", {name: "accent"}, False))
    return [chart for chart in charts if chart]


def _values(run: RunData, name: str) -> dict[int, float]:
    return {iteration: metrics[name] for iteration, metrics in run.metrics.items() if name in metrics}


def _by_iteration(run: RunData, title: str, unit: str, tones: dict[str, str], percent: bool) -> Markup:
    iterations = sorted({iteration for name in tones for iteration in _values(run, name)})
    series = [Series(name, [_values(run, name).get(i) for i in iterations], tone) for name, tone in tones.items()]
    axes = Axes(title, "iteration", unit, percent, x_names=[str(i) for i in iterations])
    return line_chart(axes, range(len(iterations)), series)


def step_charts(run: RunData) -> tuple[list[Markup], list[Markup]]:
    """Curves within the iterations: those that one looks at first, and all others."""
    marks = {step: f"iteration {iteration}" for iteration, step in iteration_starts(run).items()}
    known = {name for _, _, tones, _ in _STEP_CHARTS for name in tones}
    first = [_by_step(run, title, unit, tones, percent, marks) for title, unit, tones, percent in _STEP_CHARTS]
    others = dict.fromkeys(name for entry in run.log for name in entry)
    others = [
        n for n in others if n not in known | _NOT_A_CURVE and not n.startswith(("eval_", "self_play/", "train_"))
    ]
    more = [_by_step(run, name, "", {name: "accent"}, False, marks) for name in others]
    return [chart for chart in first if chart], [chart for chart in more if chart]


def _by_step(
    run: RunData, title: str, unit: str, tones: dict[str, str], percent: bool, marks: dict[float, str]
) -> Markup:
    entries = [e for e in run.log if any(_is_number(e.get(name)) for name in tones) and _is_number(e.get("step"))]
    series = [
        Series(name, [entry[name] if _is_number(entry.get(name)) else None for entry in entries], tone)
        for name, tone in tones.items()
    ]
    return line_chart(Axes(title, "step", unit, percent, marks=marks), [entry["step"] for entry in entries], series)


def iteration_starts(run: RunData) -> dict[int, float]:
    """Iteration -> steps before it. The log has an entry when an iteration's pairs are made."""
    entries = [entry for entry in run.log if {ITERATION, "step", "self_play/num_pairs"} <= entry.keys()]
    return {entry[ITERATION]: entry["step"] for entry in entries if entry[ITERATION] > 0}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)


def length_charts(run: RunData) -> list[Markup]:
    """How long the two sides are, for each iteration, over the same bins."""
    longest = max((len(c) for counts in (run.chosen_lengths, run.rejected_lengths) for c in counts.values()), default=1)
    size = -(-longest // _MAX_BINS)
    names = [str(start) if size == 1 else f"{start}–{start + size - 1}" for start in range(0, longest, size)]
    charts = []
    for iteration, rejected in run.rejected_lengths.items():
        sides = [("chosen", run.chosen_lengths[iteration]), ("rejected", rejected)]
        series = [Series(name, _binned(counts, size, len(names)), name) for name, counts in sides if counts.sum()]
        axes = Axes(f"Lengths in iteration {iteration}", "tokens", "share of the side", percent=True)
        charts.append(bar_chart(axes, names, series))
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
    return bar_chart(axes, [str(i) for i in iterations], series, stacked=True)


def metrics_table(run: RunData) -> Markup:
    """Every number of every `metrics.json`."""
    names = sorted({name for metrics in run.metrics.values() for name in metrics})
    rows = [
        [name, *(format_number(metrics.get(name), name.endswith("_share")) for metrics in run.metrics.values())]
        for name in names
    ]
    return table(["", *(f"iteration {iteration}" for iteration in run.metrics)], rows)
