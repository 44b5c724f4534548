"""When self-play ends, if asked for: opponent and data, or the rewards where they choose, no longer differ.

SPIN (arXiv 2401.01335), theorem 5.2: where the opponent is the data's distribution, it is the best reply to itself, so
that no further iteration moves it. Knows nothing of how the numbers come about.
"""

from collections.abc import Mapping

from ..run_directory.run import RunEnd
from ..spin_config import SPINConfig


# How near to a half the accuracy, and to 1 a share has to be. With few rows chance alone is further: `1 / sqrt(rows)`.
_TOLERANCE = 0.02


class Converged(RunEnd):
    """There is nothing left to learn."""

    kind = "converged"

    def __init__(self, iteration: int, rule: str, reason: str, **numbers: float):
        message = f"Self-play has converged before iteration {iteration}: {reason}"
        super().__init__(message, iteration, rule, **numbers, tolerance=_TOLERANCE)


def check_evaluation(iteration: int, scores: Mapping[str, float], args: SPINConfig) -> None:
    """[`Converged`] if, with what an iteration has taught it, the policy cannot tell held-out truths from answers."""
    accuracy = scores.get("rewards/accuracies")
    if _judges_truths(args) and accuracy is not None and abs(accuracy - 0.5) <= _TOLERANCE:
        reason = (
            f"on `eval_dataset` the policy after iteration {iteration - 1} tells the ground truth from its opponent's "
            f"answer in {accuracy:.1%} of the pairs, within {_TOLERANCE:.1%} of a coin's toss."
        )
        raise Converged(iteration, "held-out accuracy", reason, accuracy=accuracy)


def check_identical_share(iteration: int, share: float, args: SPINConfig) -> None:
    """[`Converged`] if nearly all of the opponent's answers equal the ground truth."""
    if _judges_truths(args) and share >= 1 - _TOLERANCE:
        reason = f"its opponent reproduces the ground truth in {share:.1%} of the pairs, at least {1 - _TOLERANCE:.1%}."
        raise Converged(iteration, "identical pairs", reason, identical_share=share)


def check_no_pair_share(iteration: int, share: float, args: SPINConfig) -> None:
    """[`Converged`] if rewards choose, and find hardly any prompt's answers to differ."""
    if args.stop_when_converged and share >= 1 - _TOLERANCE:
        reason = f"with `pairing={args.pairing!r}`, {share:.1%} of prompts make no pair, at least {1 - _TOLERANCE:.1%}."
        raise Converged(iteration, "equal rewards", reason, no_pair_share=share)


def _judges_truths(args: SPINConfig) -> bool:
    """With another pairing the policy does not learn to tell the ground truths."""
    return args.stop_when_converged and args.pairing == "ground_truth"
