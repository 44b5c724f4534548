"""IRIS (arXiv 2604.20933): a Renyi divergence, of a whole batch. Reconstructed from the formula."""

import math

import torch

from ...config_checks import NumberRule
from ..objective import LogProbs, Objective, register


def iris(logps: LogProbs, beta: float, iris_alpha: float) -> torch.Tensor:
    """
    `-[1/(a-1) * log E_y e^((a-1) * r(y)) - 1/a * log E_y' e^(a * r(y'))]`, without dimensions.

    Its prefactors are not confirmed by a second source. What is tested is that its minimum is at
    `r = log(p_data / p_t)`, where its value is `-log(sum p_data^a * p_t^(1-a)) / (a * (a-1))`, a Renyi divergence.

    The expectations are means over all pairs of one forward pass, those of every process together; over the passes of
    gradient accumulation the loss is averaged. The logarithm of a mean over few pairs is biased: take
    `per_device_train_batch_size` as large as memory allows. `beta` plays no part in it.
    """
    chosen = _log_mean_exp((iris_alpha - 1) * logps.chosen_logratios) / (iris_alpha - 1)
    rejected = _log_mean_exp(iris_alpha * logps.rejected_logratios) / iris_alpha
    return rejected - chosen


def _log_mean_exp(values: torch.Tensor) -> torch.Tensor:
    return values.logsumexp(dim=0) - math.log(len(values))


_ALPHA = NumberRule(
    "positive and other than 1, where the loss is not defined",
    lambda value: value > 0 and value != 1,
    remedy="Take 0.5, the default, or for the limits at 0 and at 1 a number near them, such as 0.01 or 0.99.",
)

register(
    Objective(
        "iris",
        iris,
        fields={"iris_alpha": _ALPHA},
        is_of_batch=True,
        needs_data_and_opponent=True,
        needs_samples_of_reference=True,
    )
)
