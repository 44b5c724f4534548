"""Markdown tables of means and standard deviations. Knows nothing of runs and files."""

import statistics
from collections.abc import Mapping, Sequence

from .findings import Tried
from .methods import Setting


Scores = Mapping[str, float]


def by_iteration(start: float, of_methods: Mapping[str, Sequence[Sequence[float]]], digits: int) -> str:
    """
    One row a method, one column an iteration.

    Args:
        start (`float`): Of the model that all start from.
        of_methods (`Mapping[str, Sequence[Sequence[float]]]`): Of each method, for each seed, after each iteration.
    """
    num_iterations = max((len(one) for seeds in of_methods.values() for one in seeds), default=0)
    header = ["", "start", *(f"after iteration {i}" for i in range(num_iterations))]
    rows = [
        [title, f"{start:.{digits}f}", *(mean_and_deviation(values, digits) for values in zip(*seeds, strict=True))]
        for title, seeds in of_methods.items()
    ]
    return markdown(header, rows)


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """With the sample standard deviation, where there is one."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def of_settings(tried: Mapping[str, Sequence[Tried]], chosen: Mapping[str, Setting], digits: int) -> str:
    """All settings of each method with their scores, the chosen one in bold."""
    rows = [
        [title, ", ".join(_with_score(t, t.setting == chosen[title], digits) for t in settings)]
        for title, settings in tried.items()
    ]
    return markdown(["", "settings: score on the validation part"], rows)


def setting_in_words(setting: Setting) -> str:
    """Such as `3e-05, beta 0.1`."""
    others = [f"{name} {value:g}" for name, value in setting.items() if name != "learning_rate"]
    return ", ".join([f"{setting['learning_rate']:g}", *others])


def _with_score(tried: Tried, is_chosen: bool, digits: int) -> str:
    score = "no number" if tried.score is None else f"{tried.score:.{digits}f}"
    text = f"{setting_in_words(tried.setting)}: {score}"
    return f"**({text})**" if is_chosen else f"({text})"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
