"""`Opponents`: the policy saved and published as the newest opponent, and earlier ones played again.

Knows nothing of URLs, prompts and scores. Every process must call the methods of the class together.
"""

from collections.abc import Iterator
from contextlib import contextmanager
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


class Opponents:
    """
    A run's opponents, each named by the number of its iteration. The policy is the newest, as it stands.

    `base_is_opponent` says whether the first one is the base model as the sampler already has it.
    """

    def __init__(
        self,
        args: SPINConfig,
        policy: Policy,
        sampler: OpponentSampler,
        store: IterationStore,
        turns: Turns,
        base_is_opponent: bool = True,
        base_model: str = "",
    ):
        self.args = args
        self.policy = policy
        self.sampler = sampler
        self.store = store
        self.turns = turns
        self.base_is_opponent = base_is_opponent
        self.base_model = base_model

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
        earlier = self._earlier(iteration)
        checkpoint = self._save_if_needed(iteration)
        published = [iteration, checkpoint]
        if self._plays_several and earlier:
            published.append({opponent: self._path(opponent) for opponent in earlier})
        self.turns.give_to_server()
        on_main_process(lambda: self.sampler.publish(*published))
        self.sampler.select(*published)

    def save(self, iteration: int) -> Path:
        """Save the policy as it stands as the opponent of `iteration`."""

        def save() -> Path:
            return self.store.write_opponent(iteration, self.policy.save, PartialState().is_main_process)

        return on_every_process(save)

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
            path = self._path(opponent)
            on_main_process(lambda: self.sampler.publish(opponent, path))
            self.sampler.select(opponent, path)
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

    def _path(self, opponent: int) -> Path | None:
        """What a sampler that reads checkpoints loads an opponent from."""
        is_base = opponent == 0 and self.base_is_opponent
        return None if is_base else self.store.path(opponent, "opponent")

    def _earlier(self, iteration: int) -> list[int]:
        """The opponents beside the newest that take part in an iteration. The final policy is only evaluated."""
        draw = self.draw(iteration)
        if draw is None or iteration >= self.args.num_iterations:
            return []
        earlier = [opponent for opponent in draw.opponents if opponent != iteration]
        on_main_process(lambda: self._require_saved(earlier))
        return earlier

    def _require_saved(self, opponents: list[int]) -> None:
        for opponent in opponents:
            path = self.store.path(opponent, "opponent")
            is_read = self._path(opponent) is not None or not self.sampler.reads_checkpoints
            if is_read and not path.is_dir():
                raise RunDirectoryError(
                    f"{path} is not there, but `num_opponents` ({self.args.num_opponents}) has that opponent "
                    "take part. Put it back, resume from a checkpoint of an earlier iteration, or play the run again "
                    "with `overwrite_output_dir=True`."
                )

    def _save_if_needed(self, iteration: int) -> Path | None:
        """Save the policy if anybody will load it. Returns what is published."""
        if is_saved(iteration, self.args, self.sampler.reads_checkpoints, self.base_is_opponent):
            self.save(iteration)
        return self._path(iteration) if self.sampler.reads_checkpoints else None


def is_saved(iteration: int, args: SPINConfig, reads_checkpoints: bool, base_is_opponent: bool) -> bool:
    """Whether an iteration's opponent is saved: to be read by a sampler, or to score, answer or be the policy again."""
    is_base = iteration == 0 and base_is_opponent
    is_reference = iteration == 0 and args.reference_mixture_alpha > 0
    plays_again = args.num_opponents > 1 and not reads_checkpoints
    is_loaded = (reads_checkpoints or is_reference) and not is_base
    return is_loaded or plays_again or bool(args.takes_back_policies)
