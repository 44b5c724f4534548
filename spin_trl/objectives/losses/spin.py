"""The further losses that SPIN's paper names (arXiv 2401.01335, eq. 4.7); its logistic and hinge loss are TRL's."""

import torch

from ..objective import LogProbs, Objective, register


def exponential(logps: LogProbs, beta: float) -> torch.Tensor:
    """`e^-t` with `t = beta * (r(y) - r(y'))`, of shape `(B,)`."""
    return torch.exp(-beta * (logps.chosen_logratios - logps.rejected_logratios))


def correlation(logps: LogProbs, beta: float) -> torch.Tensor:
    """
    `1 - t` with `t = beta * (r(y) - r(y'))`, of shape `(B,)`. It has no lower bound: nothing but the learning rate and
    the number of steps holds the policy back.
    """
    return 1 - beta * (logps.chosen_logratios - logps.rejected_logratios)


for _function in (exponential, correlation):
    register(Objective(_function.__name__, _function, is_of_difference=True, learns_from_identical_pairs=False))
