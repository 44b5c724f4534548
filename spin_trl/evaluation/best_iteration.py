"""Which iteration made the best policy, by one of the evaluation's metrics. Knows nothing of how these come about."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..spin_config import SPINConfig
from .metric_names import EVALUATION, EVALUATION_METRICS, label


@dataclass(frozen=True)
class BestIteration:
    """The best policy is that opponent, which iteration `opponent - 1` has made; `values` has all, by their labels."""

    opponent: int
    metric: str
    values: dict[str, float]

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in self.values.items())
        what = "The start" if self.opponent == 0 else f"The policy after {label(self.opponent)}"
        return f"{what} is the best by `{self.metric}`: {shown}."

    def describe(self) -> dict[str, Any]:
        """For `self_play.json`."""
        return {**asdict(self), "after": label(self.opponent)}


def check_best_iteration(args: SPINConfig, has_eval_dataset: bool, has_generation_metrics: bool) -> None:
    """`ValueError` if iterations are to be compared, and nothing is evaluated or no such metric can come."""
    if args.metric_for_best_model is not None and not has_eval_dataset:
        raise ValueError(
            f"`metric_for_best_model={args.metric_for_best_model!r}` compares evaluations, but `eval_dataset` is None. "
            "Pass an `eval_dataset`, or leave the metric and `load_best_model_at_end` unset."
        )
    if not has_generation_metrics:
        check_is_evaluated(args, {})


def check_is_evaluated(args: SPINConfig, scores: Mapping[str, float]) -> None:
    """`ValueError` if the metric that iterations are to be compared by is none of an evaluation's, these among them."""
    metric = args.metric_for_best_model
    known = list({**scores, **EVALUATION_METRICS})
    if metric is not None and _plain(metric) not in known:
        raise ValueError(
            f"`metric_for_best_model={metric!r}` is none of the evaluation's metrics: {known}. Name one of them, "
            "or have `compute_generation_metrics` return it, and start the same command again."
        )


def find_best(metrics: Iterable[tuple[int, dict[str, Any]]], args: SPINConfig) -> BestIteration | None:
    """
    The best of all policies of a run, by each opponent's number and its iteration's metrics: the earlier one where two
    are equal; `None` if no value can be compared.
    """
    metric = _plain(args.metric_for_best_model)
    values = {number: found.get(EVALUATION, {}).get(metric, math.nan) for number, found in metrics}
    values = {number: value for number, value in values.items() if math.isfinite(value)}
    if not values:
        return None
    is_greater_better = args.greater_is_better
    if is_greater_better is None:  # as known here, or, as transformers, by the name
        is_greater_better = EVALUATION_METRICS.get(metric, not metric.endswith(("loss", "nll")))
    best = (max if is_greater_better else min)(values, key=values.get)
    return BestIteration(best, metric, {label(number): value for number, value in values.items()})


def _plain(metric: str) -> str:
    return metric.removeprefix("eval_")
