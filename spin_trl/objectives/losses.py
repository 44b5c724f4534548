"""Objectives that DPOTrainer lacks, as functions on log-probs. Knows nothing of tokens, models and processes.

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


# Losses that look at the policy's log-probs alone. What the reference gives is computed all the same, for the metrics.
REFERENCE_FREE_LOSSES = ("sft", "t_spin")

# Losses of a whole batch, whose value is no mean over its pairs: they are given the pairs of all processes.
BATCH_LOSSES = ("iris",)


@dataclass(frozen=True)
class LossParameters:
    """
    Args:
        beta (`float`): The iteration's `beta`, the paper's lambda.
        space_mu (`float`): Ratio of generated to real data in [`space`].
        t_spin_alpha, t_spin_beta (`float`): Scale of the log-probs and weight of the second term in [`t_spin`].
        iris_alpha (`float`): Order of the divergence in [`iris`].
    """

    beta: float
    space_mu: float = 1.0
    t_spin_alpha: float = 1.0
    t_spin_beta: float = 0.1
    iris_alpha: float = 0.5


@dataclass(frozen=True)
class LogProbs:
    """
    Log-probs of a batch of pairs, each summed over the tokens of an answer, in nats.

    Args:
        chosen, rejected (`torch.Tensor` of shape `(B,)`): `log p(y)` and `log p(y')`.
        ref_chosen, ref_rejected (`torch.Tensor` of shape `(B,)`): `log p_t(y)` and `log p_t(y')`.
        initial (`torch.Tensor` of shape `(B,)`, *optional*): `log p(y0)`, where `y0` is the initial policy's answer.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    ref_chosen: torch.Tensor
    ref_rejected: torch.Tensor
    initial: torch.Tensor | None = None

    @property
    def chosen_logratios(self) -> torch.Tensor:
        """`r(y)`, of shape `(B,)`."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_logratios(self) -> torch.Tensor:
        """`r(y')`, of shape `(B,)`."""
        return self.rejected - self.ref_rejected


def exponential(logps: LogProbs, parameters: LossParameters) -> torch.Tensor:
    """
    `e^-t` with `t = beta * (r(y) - r(y'))`: SPIN (arXiv 2401.01335), eq. 4.7 with the exponential loss, which it names.

    Args:
        logps ([`LogProbs`]): Of `B` pairs.
        parameters ([`LossParameters`]): The run's.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    return torch.exp(-parameters.beta * (logps.chosen_logratios - logps.rejected_logratios))


def correlation(logps: LogProbs, parameters: LossParameters) -> torch.Tensor:
    """
    `1 - t` with `t = beta * (r(y) - r(y'))`: SPIN (arXiv 2401.01335), eq. 4.7 with the correlation loss, which it
    names. It has no lower bound: nothing but the learning rate and the number of steps holds the policy back.

    Args and returns as for [`exponential`].
    """
    return 1 - parameters.beta * (logps.chosen_logratios - logps.rejected_logratios)


def space(logps: LogProbs, parameters: LossParameters) -> torch.Tensor:
    """
    `-log sig(r(y) - log mu) - mu * log sig(log mu - r(y'))`: SPACE (arXiv 2512.07175, published), noise contrastive
    estimation.

    Real and generated answers are judged each on their own, so that the objective does not go flat as the two become
    alike. Its optimum is `p = p_data` for every `mu`. `beta` plays no part in it.

    With `n` answers to a prompt each makes a pair with the same ground truth. The mean over these `n` pairs is
    `-log sig(r(y) - log mu) - mu * mean_j log sig(log mu - r(y'_j))`, the objective of that prompt with its expectation
    over `y'` taken over `n` samples. So the loss of a pair is the same whatever `n`, and `n` need not be `mu`.

    Args and returns as for [`exponential`].
    """
    mu, log_mu = parameters.space_mu, math.log(parameters.space_mu)
    return -F.logsigmoid(logps.chosen_logratios - log_mu) - mu * F.logsigmoid(log_mu - logps.rejected_logratios)


def t_spin(logps: LogProbs, parameters: LossParameters) -> torch.Tensor:
    """
    `l(a * (log p(y) - log p(y'))) + b * l(a * (log p(y') - log p(y0)))` with `l(t) = log(1 + e^-t)`: T-SPIN (arXiv
    2601.08198, published).

    There is no reference in it, and no `beta`. `y0` was sampled once from the initial policy: it holds the policy's
    present answers above those that it began with, as the first term holds the ground truth above the present ones. In
    iteration 0, where `y' = y0`, there is no second term: its gradient would be zero.

    Args and returns as for [`exponential`].
    """
    alpha = parameters.t_spin_alpha
    loss = -F.logsigmoid(alpha * (logps.chosen - logps.rejected))
    if logps.initial is None:
        return loss
    return loss - parameters.t_spin_beta * F.logsigmoid(alpha * (logps.rejected - logps.initial))


def iris(logps: LogProbs, parameters: LossParameters) -> torch.Tensor:
    """
    `-[1/(a-1) * log E_y e^((a-1) * r(y)) - 1/a * log E_y' e^(a * r(y'))]`: IRIS (arXiv 2604.20933). Reconstructed from
    the formula: its prefactors are not confirmed by a second source. What is tested is that its minimum is at
    `r = log(p_data / p_t)`, where its value is `-log(sum p_data^a * p_t^(1-a)) / (a * (a-1))`, a Renyi divergence.

    The expectations are means over all pairs of one forward pass, those of every process together; over the passes of
    gradient accumulation the loss is averaged. The logarithm of a mean over few pairs is biased: take
    `per_device_train_batch_size` as large as memory allows. `beta` plays no part in it.

    Args:
        logps ([`LogProbs`]): Of the `B` pairs of all processes.
        parameters ([`LossParameters`]): The run's.

    Returns:
        `torch.Tensor` without dimensions.
    """
    alpha = parameters.iris_alpha
    chosen = _log_mean_exp((alpha - 1) * logps.chosen_logratios) / (alpha - 1)
    rejected = _log_mean_exp(alpha * logps.rejected_logratios) / alpha
    return rejected - chosen


def _log_mean_exp(values: torch.Tensor) -> torch.Tensor:
    return values.logsumexp(dim=0) - math.log(len(values))


SPIN_LOSSES: dict[str, Callable[[LogProbs, LossParameters], torch.Tensor]] = {
    "exponential": exponential,
    "correlation": correlation,
    "space": space,
    "t_spin": t_spin,
    "iris": iris,
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
