"""`Opponents`: the policy saved and published as the newest opponent, and earlier ones played again.

Knows nothing of URLs, prompts and scores. Every process must call the methods of the class together.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import PartialState

from ..data.draw import OpponentDraw
from ..generation.sampler import OpponentSampler
from ..policy.policy import Policy
from ..processes.ranks import on_every_process, on_main_process
from ..run_directory.run_paths import RunDirectoryError
from ..run_directory.store import IterationStore
from ..spin_config import SPINConfig
from .turns import Turns


@dataclass
class Opponents:
    """
    A run's opponents, each named by the number of its iteration. The policy is the newest, as it stands.

    `base_is_opponent` says whether the first one is the base model as the sampler already has it.
    """

    args: SPINConfig
    policy: Policy
    sampler: OpponentSampler
    store: IterationStore
    turns: Turns
    base_is_opponent: bool = True
    base_model: str = ""

    @property
    def initial_path(self) -> str:
        """Where the initial policy's weights are, a folder or a hub id."""
        return self.base_model if self.base_is_opponent else str(self.store.path(0, "opponent"))

    def draw(self, iteration: int) -> OpponentDraw | None:
        """Who answers which prompt; `None` where that is always the newest."""
        num_opponents = self.args.num_opponents
        return OpponentDraw(iteration, num_opponents, self.args.seed) if num_opponents > 1 else None

    def publish(self, iteration: int) -> None:
        """
        Make the policy as it stands the opponent of `iteration`, and have the sampler play it.

        Raises:
            [`RunDirectoryError`]: if an earlier opponent that takes part in the iteration is not on disk.
        """
        draw = self.draw(iteration) if iteration < self.args.num_iterations else None  # the final policy is evaluated
        opponents = [] if draw is None else draw.opponents
        earlier = {opponent: self._folder(opponent) for opponent in opponents if opponent != iteration}
        on_main_process(lambda: self._require_saved(earlier))
        if is_saved(iteration, self.args, self.sampler.reads_checkpoints, self.base_is_opponent):
            is_main = PartialState().is_main_process
            on_every_process(lambda: self.store.write_opponent(iteration, self.policy.save, is_main))
        published = [iteration, self._folder(iteration)]
        if self._plays_several and earlier:
            published.append(earlier)
        self.turns.give_to_server()
        on_main_process(lambda: self.sampler.publish(*published))
        self.sampler.select(*published)

    def in_turn(self, draw: OpponentDraw | None, rows: np.ndarray) -> list[tuple[int | None, np.ndarray]]:
        """
        Which of the rows can be answered at once, and by whom: all, where the newest opponent answers them; those of
        all adapters, where the sampler plays several at a time; else those of each opponent, the newest one's first.
        """
        if draw is None:
            return [(None, rows)]
        drawn = draw.of_rows(rows)
        if self._plays_several:
            # Not the base model's among them: in vLLM's CPU engine, whichever adapter is in a batch would answer them.
            is_base = (drawn == 0) & self.base_is_opponent
            shares = [(None, rows[~is_base]), (None, rows[is_base])]
        else:
            shares = [(opponent, rows[drawn == opponent]) for opponent in reversed(draw.opponents)]
        return [(opponent, share) for opponent, share in shares if len(share) > 0]

    @contextmanager
    def playing(self, opponent: int | None, newest: int) -> Iterator[None]:
        """
        Have an opponent of [`in_turn`] play. In-process the policy is itself again afterwards, bit for bit; a server
        keeps what it has, since the next iteration's opponent takes its place anyway.
        """
        if opponent in (None, newest):  # it was published first, and has played since
            yield
        elif self.sampler.reads_checkpoints:
            folder = self._folder(opponent)
            on_main_process(lambda: self.sampler.publish(opponent, folder))
            self.sampler.select(opponent, folder)
            yield
        else:
            with self.policy.lent_to(self.store.path(opponent, "opponent")):
                yield

    def take_back(self, opponent: int) -> None:
        """
        Make the policy the opponent of an iteration again, for good.

        Raises:
            [`RunDirectoryError`]: if that opponent is not on disk.
        """
        path = self.store.path(opponent, "opponent")
        if not path.is_dir():
            raise RunDirectoryError(
                f"{path}, the policy to return to, is not there. The last policy is in the newest checkpoint; to go on "
                "without the earlier one, leave `load_best_model_at_end` and `on_collapse` unset."
            )
        self.policy.load(path)
        PartialState().print(f"The policy is again the opponent of iteration {opponent}, from {path}.")

    @property
    def _plays_several(self) -> bool:
        return self.args.num_opponents > 1 and self.sampler.plays_several

    def _folder(self, opponent: int) -> Path | None:
        """What the sampler loads an opponent from. The base model it has, and in-process it loads nothing."""
        is_loaded = self.sampler.reads_checkpoints and not (opponent == 0 and self.base_is_opponent)
        return self.store.path(opponent, "opponent") if is_loaded else None

    def _require_saved(self, folders: Mapping[int, Path | None]) -> None:
        for opponent, folder in folders.items():
            path = self.store.path(opponent, "opponent")
            is_read = folder is not None or not self.sampler.reads_checkpoints  # by the sampler, or by the policy
            if is_read and not path.is_dir():
                raise RunDirectoryError(
                    f"{path} is not there, but `num_opponents` ({self.args.num_opponents}) has that opponent "
                    "take part. Put it back, resume from a checkpoint of an earlier iteration, or play the run again "
                    "with `overwrite_output_dir=True`."
                )


def is_saved(iteration: int, args: SPINConfig, reads_checkpoints: bool, base_is_opponent: bool) -> bool:
    """Whether an iteration's opponent is saved: to be read by a sampler, or to score, answer or be the policy again."""
    is_base = iteration == 0 and base_is_opponent
    is_reference = iteration == 0 and args.reference_mixture_alpha > 0
    plays_again = args.num_opponents > 1 and not reads_checkpoints
    is_loaded = (reads_checkpoints or is_reference) and not is_base
    return is_loaded or plays_again or bool(args.takes_back_policies)
