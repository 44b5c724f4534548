"""alpha-SPIN's reference: a mixture of the opponent and the initial policy. Knows nothing of models and files.

The reference is `p_t^(1-a) * p_base^a / Z` (arXiv 2404.04291, published; no code was released), where `p_t` is the
opponent, `p_base` the initial policy and `Z` the normaliser, a sum over all answers to the prompt. Nobody can compute
`Z`. In `log p_ref(y) - log p_ref(y')` it cancels, since both sides answer one prompt: losses of that difference alone
are exact with `(1-a) * log p_t + a * log p_base` in place of `log p_ref`. A loss that judges a side by itself, or
divides each by its length, would see every log-ratio too large by `-log Z`, which is at least 0 (Hölder's inequality),
differs from prompt to prompt and grows as the two policies part. So those are refused, unless `a` is 0 or 1, where
`Z` is 1.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from .losses import REFERENCE_FREE_LOSSES


if TYPE_CHECKING:
    from ..spin_config import SPINConfig


# Losses whose value does not change if a prompt's two reference log-probs rise alike.
LOSSES_OF_DIFFERENCES = ("sigmoid", "hinge", "exo_pair", "robust", "aot", "discopop", "exponential", "correlation")


def check_reference_mixture(args: "SPINConfig") -> None:
    """
    Raises:
        `ValueError`: if `reference_mixture_alpha` contradicts another field.
    """
    alpha = args.reference_mixture_alpha
    if alpha == 0:
        return
    if args.opponent_reference == "fixed":
        raise ValueError(
            f"`reference_mixture_alpha={alpha:g}` contradicts `opponent_reference='fixed'`, which is the initial model "
            "alone: a mixture with `reference_mixture_alpha=1`. Set only one of the two."
        )
    if alpha == 1:  # no mixture: the normaliser is 1
        return
    judged_alone = [name for name in args.loss_type if name not in (*LOSSES_OF_DIFFERENCES, *REFERENCE_FREE_LOSSES)]
    if judged_alone:
        raise ValueError(
            f"`reference_mixture_alpha={alpha:g}` contradicts `loss_type={judged_alone[0]!r}`, which does not see the "
            "difference of the two sides alone: the normaliser of the mixture, which cancels in that difference, is "
            f"missing there. Use one of {list(LOSSES_OF_DIFFERENCES)}, with or without 'sft', or leave "
            "`reference_mixture_alpha` unset."
        )
    if args.f_divergence_type != "reverse_kl":
        raise ValueError(
            f"`reference_mixture_alpha={alpha:g}` contradicts `f_divergence_type={args.f_divergence_type!r}`, which "
            "takes a function of each side's log-ratio: the normaliser of the mixture, which cancels in their "
            "difference, is missing there. Leave one of the two unset."
        )


def mix_scores(
    opponent: Mapping[str, np.ndarray], initial: Mapping[str, np.ndarray], alpha: float
) -> dict[str, np.ndarray]:
    """
    The mixture's log-probs, but for the normaliser.

    Args:
        opponent, initial (`Mapping[str, np.ndarray]`): Log-probs of the same answers, in nats, under the same names.
        alpha (`float`): Share of the initial policy. At 1 exactly its log-probs.
    """
    return {
        name: ((1 - alpha) * logps.astype(np.float64) + alpha * initial[name].astype(np.float64)).astype(logps.dtype)
        for name, logps in opponent.items()
    }
