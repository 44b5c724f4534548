"""Objectives that DPOTrainer lacks, as functions on log-ratios. Knows nothing of batches and models.

A log-ratio is `r(u) = log p(u|x) - log p_t(u|x)`: of an answer `u`, summed over its tokens, between the policy `p` and
the reference `p_t`, which in self-play is the opponent. The ground truth `y` is chosen, the opponent's answer `y'`
rejected. SPIN's own logistic and hinge loss are TRL's `sigmoid` and `hinge`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


# The loss types that DPOTrainer computes itself.
TRL_LOSSES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)


@dataclass(frozen=True)
class LossParameters:
    """
    Args:
        beta (`float`): The iteration's `beta`, the paper's lambda.
        space_mu (`float`): Ratio of generated to real data in [`space`].
    """

    beta: float
    space_mu: float = 1.0


def exponential(
    chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, parameters: LossParameters
) -> torch.Tensor:
    """
    `e^-t` with `t = beta * (r(y) - r(y'))`: SPIN (arXiv 2401.01335), eq. 4.7 with the exponential loss, which it names.

    Args:
        chosen_logratios, rejected_logratios (`torch.Tensor` of shape `(B,)`): `r(y)` and `r(y')`, in nats.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    return torch.exp(-parameters.beta * (chosen_logratios - rejected_logratios))


def correlation(
    chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, parameters: LossParameters
) -> torch.Tensor:
    """
    `1 - t` with `t = beta * (r(y) - r(y'))`: SPIN (arXiv 2401.01335), eq. 4.7 with the correlation loss, which it
    names. It has no lower bound: nothing but the learning rate and the number of steps holds the policy back.

    Args and returns as for [`exponential`].
    """
    return 1 - parameters.beta * (chosen_logratios - rejected_logratios)


def space(chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, parameters: LossParameters) -> torch.Tensor:
    """
    `-log sig(r(y) - log mu) - mu * log sig(log mu - r(y'))`: SPACE (arXiv 2512.07175), noise contrastive estimation.

    Real and generated answers are judged each on their own, so that the objective does not go flat as the two become
    alike. Its optimum is `p = p_data` for every `mu`. `beta` plays no part in it.

    Args and returns as for [`exponential`].
    """
    log_mu = math.log(parameters.space_mu)
    return -F.logsigmoid(chosen_logratios - log_mu) - parameters.space_mu * F.logsigmoid(log_mu - rejected_logratios)


SPIN_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor, LossParameters], torch.Tensor]] = {
    "exponential": exponential,
    "correlation": correlation,
    "space": space,
}


def check_loss_types(names: list[str]) -> None:
    """
    Raises:
        `ValueError`: if a loss type is unknown.
    """
    unknown = [name for name in names if name not in TRL_LOSSES and name not in SPIN_LOSSES]
    if unknown:
        raise ValueError(
            f"`loss_type` has the unknown value(s) {unknown}. Use one or several of "
            f"{sorted([*TRL_LOSSES, *SPIN_LOSSES])}."
        )
