"""Names under which numbers are kept and logged. docs/metrics.md says what each means.

Knows nothing of how the numbers come about.
"""

from collections.abc import Mapping
from numbers import Real
from typing import Any


ITERATION = "self_play/iteration"
EVALUATION = "evaluation"  # key of an opponent's evaluation in an iteration's metrics.json

# The evaluation metrics that every run has, without `eval_`, and whether the greater value is the better one.
EVALUATION_METRICS = {
    "nll": False,
    "rewards/chosen": True,
    "rewards/rejected": False,
    "rewards/accuracies": True,
    "rewards/margins": True,
}


def label(opponent: int) -> str:
    """What an evaluation is called: the opponent of an iteration is what the iteration before it made."""
    return "start" if opponent == 0 else f"iteration {opponent - 1}"


def logged_values(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What of an iteration's `metrics.json` is logged, under the names that it is logged by."""
    logged = {f"self_play/{name}": value for name, value in metrics.items() if isinstance(value, Real)}
    return logged | {f"eval_{name}": value for name, value in metrics.get(EVALUATION, {}).items()}
