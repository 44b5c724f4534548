"""`CollapseGuard`: looks for signs of collapse as a run goes on, and does what `on_collapse` says.

Knows nothing of how the numbers come about, and of limits: those are `collapse`'s.
"""

from collections.abc import Callable
from typing import Any

from accelerate.logging import get_logger

from ..processes.ranks import on_main_process
from ..run_directory.run import RunEnd
from ..run_directory.store import IterationStore
from ..spin_config import SPINConfig
from .collapse import CollapseSign, sign_within, signs_between
from .metric_names import label


logger = get_logger(__name__)

_OF_TRUTHS = ("logps_gap", "opponent_nll")


class Collapsed(RunEnd):
    """An iteration made the policy worse, and the run is to end then."""

    kind = "collapsed"


class CollapseGuard:
    """
    Every process calls its methods. What it finds is kept in `metrics.json` of the iteration whose opponent is judged,
    under `collapse_signs`, and counted for the loggers; but not of a final policy that is not evaluated.

    Args:
        args ([`SPINConfig`]): Says what to do on a sign.
        store ([`IterationStore`]): The run directory, with the iterations' numbers.
        log_history (`Callable[[], list[dict]]`): What the trainer has logged so far.
    """

    def __init__(self, args: SPINConfig, store: IterationStore, log_history: Callable[[], list[dict[str, Any]]]):
        self.args = args
        self.store = store
        self.log_history = log_history

    def look_at_training(self, opponent: int) -> None:
        """
        Judge the training that has made the opponent of an iteration, when it is over.

        Raises:
            [`Collapsed`]: if there is a sign of collapse and the run is to end.
        """
        iteration = opponent - 1
        if iteration < 0:
            return
        args = self.args
        epochs = [number * args.epochs_per_iteration for number in (iteration, opponent)]
        steps = [
            entry
            for entry in self.log_history()
            if "rewards/margins" in entry and epochs[0] < entry["epoch"] <= epochs[1]
        ]

        has_initial = args.opponent_reference == "fixed" or args.reference_mixture_alpha > 0
        starts_at_zero = iteration == 0 or not has_initial

        def look() -> list[CollapseSign]:
            mean_length = self.store.read_metrics(iteration).get("chosen_length")
            if not mean_length:
                return []
            sign = sign_within(steps, args.beta_at(iteration), mean_length, starts_at_zero)
            return [] if sign is None else [sign]

        self._act(opponent, on_main_process(look))

    def look_at_opponent(self, opponent: int) -> None:
        """
        Judge what the opponent of an iteration has answered, once its pairs are scored.

        Raises:
            [`Collapsed`]: if there is a sign of collapse and the run is to end.
        """

        def look() -> list[CollapseSign]:
            if opponent == 0:
                return []
            metrics = [self.store.read_metrics(number) for number in (0, opponent - 1, opponent)]
            if self.args.pairing != "ground_truth":  # then these are of other prompts in every iteration
                metrics = [{k: v for k, v in one.items() if k not in _OF_TRUTHS} for one in metrics]
            return signs_between(*metrics)

        self._act(opponent, on_main_process(look))

    def _act(self, opponent: int, signs: list[CollapseSign]) -> None:
        on_main_process(lambda: self._record(opponent, signs))
        action = self.args.on_collapse
        texts = [f"Sign of collapse after {label(opponent)}: {sign}" for sign in signs]
        for text in texts:
            logger.warning(text)
        if not signs or action == "warn":
            return
        raise Collapsed(
            f"Self-play ends before iteration {opponent} (`on_collapse={action!r}`). {' '.join(texts)}",
            opponent,
            ", ".join(sign.name for sign in signs),
            returned_to=opponent - 1 if action == "rollback" else None,
        )

    def _record(self, opponent: int, signs: list[CollapseSign]) -> None:
        if opponent not in self.store.iterations():
            return  # the final policy, which nobody evaluates
        known = self.store.read_metrics(opponent).get("collapse_signs", {})
        known |= {sign.name: sign.numbers for sign in signs}
        found = {"num_collapse_signs": len(known)}
        self.store.write_metrics(opponent, {**found, "collapse_signs": known} if known else found)
