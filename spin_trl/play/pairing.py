"""`Ranking`: an iteration's rewards, and what they make of its pairs, in the run directory. Knows no policies."""

from typing import TYPE_CHECKING

from accelerate.logging import get_logger
from datasets import Dataset

from ..data.pair_dataset import PairDataset
from ..data.pairs import make_answers
from ..data.rewards.judged_answers import AnswerRewards, describe_rewards, rewarded_schema
from ..data.rewards.ranked_pairs import no_pairs, rank_answers, ranked_pairs, ranked_schema
from ..evaluation.endings import check_no_pair_share
from ..processes.ranks import on_main_process
from ..run_directory.completion_parts import CompletionParts
from ..run_directory.store import IterationStore


if TYPE_CHECKING:
    from ..spin_trainer import SPINTrainer

logger = get_logger(__name__)

_MANY = 0.5  # ground truths that a model which has not been trained yet beats


class Ranking:
    """
    Rewards are computed once per iteration, on the main process, and kept with the pairs.

    Args:
        trainer ([`SPINTrainer`]): Has the settings and its own state, which reward functions are shown.
        store ([`IterationStore`]): The run directory.
        rewards ([`AnswerRewards`]): Judges.
    """

    def __init__(self, trainer: "SPINTrainer", store: IterationStore, rewards: AnswerRewards):
        self.trainer = trainer
        self.store = store
        self.rewards = rewards

    def write_answers(self, iteration: int, data: Dataset, parts: CompletionParts) -> None:
        """
        Write the pairs of ground truth and generation with their rewards. Called on the main process.

        Args:
            iteration (`int`): Number of the iteration.
            data ([`~datasets.Dataset`]): With the columns `row`, `source_row`, `prompt` and `chosen_ids`.
            parts ([`CompletionParts`]): All generations.
        """
        total = len(data) * self.trainer.args.num_generations
        answers = make_answers(data, parts.batches(self.rewards.batch_size), iteration)
        rewarded = self.rewards.add(data, answers, self.trainer.state, iteration, total)
        schema = rewarded_schema(self._has_opponents)
        self.store.write_answers(iteration, rewarded, schema, 2 * parts.num_bytes())
        described = describe_rewards(self.store.read_answers(iteration))
        self.store.write_metrics(iteration, described | self.rewards.take_metrics())
        self._warn(iteration, described)

    @property
    def _has_opponents(self) -> bool:
        return self.trainer.args.num_opponents > 1

    def choose(self, iteration: int, answers: PairDataset) -> PairDataset:
        """
        The pairs that the rewards make, in place of ground truth against generation. Every process calls.

        Args:
            iteration (`int`): Number of the iteration.
            answers ([`PairDataset`]): What `write_answers` wrote, joined with the run's data.

        Raises:
            [`Converged`]: if that is asked for and hardly any prompt makes one.
            [`NoPairsError`]: if they make none.
        """
        args = self.trainer.args

        def write() -> float:
            ranks = rank_answers(answers, args.pairing)
            described = ranks.describe()
            if described["num_pairs"]:
                pairs, schema = ranked_pairs(answers, ranks), ranked_schema(self._has_opponents)
                num_bytes = 2 * self.store.completions(iteration, "generations").num_bytes()
                self.store.write_answers(iteration, pairs, schema, 2 * num_bytes, kind="ranked")  # two sides
            self.store.write_metrics(iteration, described)
            return described["no_pair_share"]

        no_pair_share = on_main_process(write)
        check_no_pair_share(iteration, no_pair_share, args)
        if no_pair_share == 1:
            raise no_pairs(args.pairing)
        return PairDataset.join(self.store.read_data(), self.store.read_answers(iteration, kind="ranked"))

    def _warn(self, iteration: int, described: dict[str, float]) -> None:
        if described["unjudged_share"] > 0:
            logger.warning(
                f"No reward function judges {described['unjudged_share']:.1%} of the ground truths and generations of "
                f"iteration {iteration}: all return None. Where rewards choose, these make no pair."
            )
        if iteration == 0 and self.trainer.args.pairing == "best_of" and described["beaten_truths_share"] > _MANY:
            logger.warning(
                f"The first opponent already beats {described['beaten_truths_share']:.1%} of the ground truths, which "
                "will be rejected. See that the reward functions do not ask for a format that the ground truths lack; "
                "if generations are better, `pairing='reward_ranked'` needs no ground truths."
            )
