"""Signs that self-play makes the policy worse while its loss looks fine, and `CollapseGuard`, which acts on them.

SPIN, like DPO, sees differences only: both sides may become unlikely as long as the generated one does so faster
(likelihood displacement, Razin et al., 2024, https://huggingface.co/papers/2410.08847), and the opponent's answers can
degenerate. The limits are such that a healthy run stays well below them; `tests/test_collapse.py` has both kinds.
Knows nothing of how the numbers come about.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from accelerate.logging import get_logger

from ..processes.ranks import on_main_process
from ..run_directory.run import RunEnd
from ..run_directory.store import IterationStore
from ..spin_config import SPINConfig
from .metric_names import label


logger = get_logger(__name__)


# Nats per token by which the ground truths may become less likely within an iteration, or the gap may sink between two.
_MAX_FALL = 0.1
_MAX_NLL_GROWTH = 0.05  # of the opponent's negative log-likelihood of the ground truths, from one iteration to the next
_MAX_FACTOR = 2.0  # by which lengths and variety of the answers may differ from iteration 0's

_OF_TRUTHS = ("logps_gap", "opponent_nll")  # metrics, which `pairing` may take away
_REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins")  # of DPOTrainer

_TOO_FAST = (
    "the steps are too large for `beta` (learning rate divided by beta is what counts). Lower `learning_rate` or raise "
    "`beta`, add an SFT term (`loss_type: [sigmoid, sft]`), or use `loss_type: space`, which judges each side alone"
)
_LENGTH_TELLS = (
    "the policy found length to tell the sides apart by. See that `max_completion_length` leaves the answers the room "
    f"that the ground truths have; otherwise {_TOO_FAST}"
)


@dataclass(frozen=True)
class CollapseSign:
    """One sign of collapse: its name in `collapse_signs`, and in words what was found, its likely cause and remedy."""

    name: str
    numbers: str
    cause: str = _TOO_FAST

    def __str__(self) -> str:
        return f"{self.numbers} Likely cause and remedy: {self.cause}."


def sign_within(
    steps: Sequence[Mapping[str, float]], beta: float, mean_length: float, starts_at_zero: bool = True
) -> CollapseSign | None:
    """
    Whether the ground truths' log-probs sank within an iteration while the margins grew.

    Args:
        steps (`Sequence[Mapping[str, float]]`): What was logged in the iteration's training, in order. Entries without
            DPOTrainer's `rewards/` are left out.
        mean_length (`float`): Mean number of tokens of the ground truths.
        starts_at_zero (`bool`): Whether the reference is the policy that the iteration began with. Where it is another,
            rewards begin with what lies between the two, and the first step's are taken for the start.
    """
    steps = [step for step in steps if "rewards/margins" in step]
    if not steps or beta <= 0:
        return None
    start = dict.fromkeys(_REWARDS, 0.0) if starts_at_zero else {name: steps[0][name] for name in _REWARDS}
    parts = np.array_split(steps, min(4, len(steps)))  # a single step may be an outlier
    quarters = [start, *({name: fmean(step[name] for step in part) for name in _REWARDS} for part in parts)]
    best, last = max(quarters, key=lambda quarter: quarter["rewards/chosen"]), quarters[-1]
    # Rewards are `beta` times the change of the log-prob since the iteration began.
    fall = (best["rewards/chosen"] - last["rewards/chosen"]) / beta / mean_length
    sinks_too = last["rewards/rejected"] < best["rewards/rejected"]
    if fall <= _MAX_FALL or not sinks_too or last["rewards/margins"] <= best["rewards/margins"]:
        return None
    return CollapseSign(
        "displacement",
        f"Both sides' log-probs sink while the margins grow (likelihood displacement): the ground truths lost "
        f"{fall:.2f} nats a token since their best in this iteration, while `rewards/margins` went from "
        f"{best['rewards/margins']:.3g} to {last['rewards/margins']:.3g}.",
    )


def signs_between(
    first: Mapping[str, float], previous: Mapping[str, float], current: Mapping[str, float]
) -> list[CollapseSign]:
    """
    What an iteration's opponent shows, next to the one before and the first, by the metrics `logps_gap`,
    `opponent_nll`, `rejected_length` and `distinct_2` of these iterations. What is missing is not judged.
    """
    signs = []

    def numbers(name: str, earlier: Mapping[str, float]) -> tuple[float, float]:
        return earlier.get(name, math.nan), current.get(name, math.nan)  # nothing holds of what is missing

    before, now = numbers("logps_gap", previous)
    if now < 0 and before - now > _MAX_FALL:
        found = "The policy prefers its own answers to the ground truths, and more so than before: `logps_gap` sank "
        signs.append(CollapseSign("negative_gap", f"{found}from {before:.2f} to {now:.2f} nats a token."))
    before, now = numbers("opponent_nll", previous)
    if now > before * (1 + _MAX_NLL_GROWTH):
        found = "An iteration made the ground truths less likely: `opponent_nll` rose "
        signs.append(CollapseSign("unlikely_truths", f"{found}from {before:.3f} to {now:.3f} nats a token."))
    before, now = numbers("rejected_length", first)
    if before > 0 and (now < before / _MAX_FACTOR or now > before * _MAX_FACTOR):
        found = f"The answers' mean length, {now:.1f} tokens, is far from iteration 0's {before:.1f}."
        signs.append(CollapseSign("length", found, _LENGTH_TELLS))
    before, now = numbers("distinct_2", first)
    if now < before / _MAX_FACTOR:
        found = f"The answers repeat themselves: of distinct bigrams there are {now:.3f}, {before:.3f} in iteration 0."
        signs.append(CollapseSign("variety", found, f"a cooled sampler, or that {_TOO_FAST}"))
    return signs


class Collapsed(RunEnd):
    """An iteration made the policy worse, and the run is to end then."""

    kind = "collapsed"


@dataclass
class CollapseGuard:
    """
    Every process calls its methods, which raise [`Collapsed`] if there is a sign of collapse and the run is to end.
    What it finds is kept in `metrics.json` of the iteration whose opponent is judged, under `collapse_signs`, and
    counted for the loggers; but not of a final policy that is not evaluated.
    """

    args: SPINConfig
    store: IterationStore
    log_history: Callable[[], list[dict[str, Any]]]  # what the trainer has logged so far

    def look_at_training(self, opponent: int) -> None:
        """Judge the training that has made the opponent of an iteration, when it is over."""
        iteration = opponent - 1
        if iteration < 0:
            return
        args = self.args
        begin, end = (number * args.epochs_per_iteration for number in (iteration, opponent))
        steps = [entry for entry in self.log_history() if begin < entry.get("epoch", 0) <= end]
        starts_at_zero = iteration == 0 or args.reference_mixture_alpha == 0
        mean_length = on_main_process(lambda: self.store.read_metrics(iteration)["chosen_length"])
        sign = sign_within(steps, args.beta_at(iteration), mean_length, starts_at_zero)
        self._act(opponent, [] if sign is None else [sign])

    def look_at_opponent(self, opponent: int) -> None:
        """Judge what the opponent of an iteration has answered, once its pairs are scored."""
        numbers = (0, opponent - 1, opponent) if opponent > 0 else ()
        metrics = on_main_process(lambda: [self.store.read_metrics(number) for number in numbers])
        if self.args.pairing != "ground_truth":  # then these are of other prompts in every iteration
            metrics = [{name: value for name, value in one.items() if name not in _OF_TRUTHS} for one in metrics]
        self._act(opponent, signs_between(*metrics) if metrics else [])

    def _act(self, opponent: int, signs: list[CollapseSign]) -> None:
        on_main_process(lambda: self._record(opponent, {sign.name: sign.numbers for sign in signs}))
        action = self.args.on_collapse
        texts = [f"Sign of collapse after {label(opponent)}: {sign}" for sign in signs]
        for text in texts:
            logger.warning(text)
        if signs and action != "warn":
            reason = f"Self-play ends before iteration {opponent} (`on_collapse={action!r}`). {' '.join(texts)}"
            rule = ", ".join(sign.name for sign in signs)
            raise Collapsed(reason, opponent, rule, returned_to=opponent - 1 if action == "rollback" else None)

    def _record(self, opponent: int, found: dict[str, str]) -> None:
        if opponent not in self.store.iterations():
            return  # the final policy, which nobody evaluates
        found = self.store.read_metrics(opponent).get("collapse_signs", {}) | found
        signs = {"collapse_signs": found} if found else {}
        self.store.write_metrics(opponent, {"num_collapse_signs": len(found), **signs})
