"""`Pairing`: an iteration's answers -> its pairs, scored by its opponent. Knows nothing of samplers and trainers."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset
from transformers import TrainerState

from ..data.columns import numbers
from ..data.pair_dataset import PairDataset
from ..data.pair_metrics import describe_pairs, describe_scores
from ..data.pairs import add_older_pairs, drop_identical_pairs, find_identical_pairs, make_answers
from ..data.rewards.judged_answers import AnswerRewards, describe_rewards
from ..data.rewards.ranked_pairs import no_pairs, rank_answers, ranked_pairs
from ..evaluation.endings import check_identical_share, check_no_pair_share
from ..objectives.reference_mixture import mix_scores
from ..objectives.settings import keeps_identical_pairs, needs_initial_answers
from ..policy.finite import require_finite_scores
from ..policy.policy import Policy
from ..processes.ranks import on_main_process
from ..run_directory.store import IterationStore
from ..run_directory.whole_files import remove
from ..spin_config import SPINConfig
from .records import Records


logger = get_logger(__name__)

_MANY = 0.5  # ground truths that a model which has not been trained yet beats


@dataclass
class Pairing:
    """
    Makes the pairs of an iteration from what is on disk: the ground truths, its opponent's answers, and older pairs.
    Every process calls the methods together. The policy is the opponent, before the iteration's first step.

    `rewards` judge ground truths and generations, and are shown the trainer's `state`.
    """

    args: SPINConfig
    policy: Policy
    store: IterationStore
    records: Records
    rewards: AnswerRewards | None
    state: Callable[[], TrainerState]

    def make(self, iteration: int, dataset: Dataset) -> PairDataset:
        """
        The pairs to train on: those of the iteration's answers, without what cannot be learned from, those of the
        iterations before it, and the user's preferences.

        Raises:
            [`Converged`]: if that is asked for and there is nothing left to learn.
            [`NoPairsError`]: if the answers make no pair.
        """
        args = self.args
        on_main_process(lambda: self._write_answers(iteration, dataset))
        if iteration == 0 and needs_initial_answers(args.loss_type, vars(args)):
            on_main_process(self.store.initial_answers.keep)
        pairs = PairDataset.join(dataset, self.store.answers(iteration).read())
        is_identical = find_identical_pairs(pairs)
        parts = self.store.completions(iteration, "generations")
        described = describe_pairs(pairs, is_identical, parts.batches(), args.seed, args.max_length)
        self.records.record(iteration, described)
        check_identical_share(iteration, described["identical_share"], args)
        if args.pairing != "ground_truth":
            pairs = self._choose_by_reward(iteration, pairs)
            is_identical = find_identical_pairs(pairs)
        if not keeps_identical_pairs(args.identical_pairs, args.loss_type):
            pairs = drop_identical_pairs(pairs, is_identical)
        first = max(0, iteration - args.num_history_iterations)
        previous = [(number, self.store.read_pairs(number)) for number in range(first, iteration)]
        return add_older_pairs(pairs, previous, self.store.read_preferences())

    def score(self, iteration: int, pairs: PairDataset) -> dict[str, np.ndarray]:
        """The opponent's log-probs of both sides of every pair, as [`Policy.score`] gives them."""
        args, scores = self.args, self.policy.score(pairs)
        require_finite_scores(pairs, scores, iteration)
        num_own = int((numbers(pairs.answers, "iteration") == iteration).sum())
        num_dropped = on_main_process(lambda: self.store.read_metrics(iteration)["num_pairs"]) - num_own
        if args.pairing == "reward_ranked":
            num_dropped = 0  # they were not of a ground truth and a generation
        opinion = describe_scores(pairs, scores, iteration, num_dropped, args.max_length, args.truncation_mode)
        self.records.record(iteration, {"num_training_pairs": len(pairs), **opinion})
        return scores

    def mix_with_initial(
        self, iteration: int, pairs: PairDataset, scores: dict[str, np.ndarray], initial_path: str
    ) -> dict[str, np.ndarray]:
        """The opponent's log-probs mixed with the initial policy's, where `reference_mixture_alpha` asks for it."""
        if iteration == 0 or self.args.reference_mixture_alpha == 0:
            return scores
        initial = self.policy.score_initial(pairs, initial_path)
        require_finite_scores(pairs, initial, iteration)
        return mix_scores(scores, initial, self.args.reference_mixture_alpha)

    def clean_up(self, iteration: int) -> None:
        """Remove what the pairs were made from; the pairs themselves are on disk by now, or are made again."""
        if PartialState().is_main_process:
            for kind in ("answers", "ranked"):
                remove(self.store.answers(iteration, kind).path)

    def _write_answers(self, iteration: int, dataset: Dataset) -> None:
        """Ground truth against each generation, with their rewards where there are any."""
        parts = self.store.completions(iteration, "generations")
        if self.rewards is None:
            answers = make_answers(dataset, parts.batches(), iteration)
            self.store.answers(iteration).write(answers)
            return
        answers = make_answers(dataset, parts.batches(self.rewards.batch_size), iteration)
        rewarded = self.rewards.add(dataset, answers, self.state(), iteration)
        self.store.answers(iteration).write(rewarded)
        described = describe_rewards(self.store.answers(iteration).read())
        self.store.write_metrics(iteration, described | self.rewards.take_metrics())
        if described["unjudged_share"] > 0:
            logger.warning(
                f"No reward function judges {described['unjudged_share']:.1%} of the ground truths and generations of "
                f"iteration {iteration}: all return None. Where rewards choose, these make no pair."
            )
        if iteration == 0 and self.args.pairing == "best_of" and described["beaten_truths_share"] > _MANY:
            logger.warning(
                f"The first opponent already beats {described['beaten_truths_share']:.1%} of the ground truths, which "
                "will be rejected. See that the reward functions do not ask for a format that the ground truths lack; "
                "if generations are better, `pairing='reward_ranked'` needs no ground truths."
            )

    def _choose_by_reward(self, iteration: int, answers: PairDataset) -> PairDataset:
        """The pairs that the rewards make, in place of ground truth against generation."""
        args = self.args

        def write() -> float:
            ranks = rank_answers(answers, args.pairing)
            if ranks.no_pair_share < 1:
                self.store.answers(iteration, "ranked").write(ranked_pairs(answers, ranks))
            described = {"num_pairs": len(ranks.owners), "no_pair_share": ranks.no_pair_share}
            self.store.write_metrics(iteration, described)
            return ranks.no_pair_share

        no_pair_share = on_main_process(write)
        check_no_pair_share(iteration, no_pair_share, args)
        if no_pair_share == 1:
            raise no_pairs(args.pairing)
        return PairDataset.join(self.store.read_data(), self.store.answers(iteration, "ranked").read())
