"""SPACE (arXiv 2512.07175, published): noise contrastive estimation."""

import math

import torch
import torch.nn.functional as F

from ...config_checks import positive
from ..objective import LogProbs, Objective, register


def space(logps: LogProbs, beta: float, space_mu: float) -> torch.Tensor:
    """
    `-log sig(r(y) - log mu) - mu * log sig(log mu - r(y'))`, of shape `(B,)`.

    Real and generated answers are judged each on their own, so that the objective does not go flat as the two become
    alike. Its optimum is `p = p_data` for every `mu`. `beta` plays no part in it.

    With `n` answers to a prompt each makes a pair with the same ground truth. The mean over these `n` pairs is
    `-log sig(r(y) - log mu) - mu * mean_j log sig(log mu - r(y'_j))`, the objective of that prompt with its expectation
    over `y'` taken over `n` samples. So the loss of a pair is the same whatever `n`, and `n` need not be `mu`.
    """
    log_mu = math.log(space_mu)
    return -F.logsigmoid(logps.chosen_logratios - log_mu) - space_mu * F.logsigmoid(log_mu - logps.rejected_logratios)


register(
    Objective(
        "space",
        space,
        fields={"space_mu": positive(at_most="num_generations")},
        needs_data_and_opponent=True,
        needs_samples_of_reference=True,
    )
)
