"""T-SPIN (arXiv 2601.08198, published): no reference, and a comparison with the initial policy's answers."""

import torch
import torch.nn.functional as F

from ...config_checks import not_negative, positive
from ..objective import LogProbs, Objective, register


def t_spin(logps: LogProbs, beta: float, t_spin_alpha: float, t_spin_beta: float) -> torch.Tensor:
    """
    `l(a * (log p(y) - log p(y'))) + b * l(a * (log p(y') - log p(y0)))` with `l(t) = log(1 + e^-t)`, of shape `(B,)`.

    There is no reference in it, and no `beta`. `y0` was sampled once from the initial policy: it holds the policy's
    present answers above those that it began with, as the first term holds the ground truth above the present ones. In
    iteration 0, where `y' = y0`, there is no second term: its gradient would be zero.
    """
    loss = -F.logsigmoid(t_spin_alpha * (logps.chosen - logps.rejected))
    if logps.initial is None:
        return loss
    return loss - t_spin_beta * F.logsigmoid(t_spin_alpha * (logps.rejected - logps.initial))


register(
    Objective(
        "t_spin",
        t_spin,
        fields={"t_spin_alpha": positive(), "t_spin_beta": not_negative()},
        sees_reference=False,
        sees_initial="t_spin_beta",
        needs_data_and_opponent=True,
    )
)
