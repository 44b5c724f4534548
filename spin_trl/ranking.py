"""`Ranking`: an iteration's rewards, and what they make of its pairs, in the run directory. Knows no policies."""

from typing import TYPE_CHECKING

from datasets import Dataset

from .completion_parts import CompletionParts
from .iteration_store import IterationStore
from .pair_dataset import PairDataset
from .pairs import make_answers
from .ranks import on_main_process
from .reward_answers import AnswerRewards, describe_rewards, rewarded_schema
from .reward_pairs import describe_ranked, rank_pairs, ranked_schema


if TYPE_CHECKING:
    from .spin_trainer import SPINTrainer


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
            [`NoPairsError`]: if they make none.
        """

        def write() -> None:
            ranked = rank_pairs(answers, self.trainer.args.pairing)
            num_bytes = 2 * self.store.completions(iteration, "generations").num_bytes()
            schema = ranked_schema(self._has_opponents)
            self.store.write_answers(iteration, ranked, schema, 2 * num_bytes, kind="ranked")  # two sides
            ranked = self.store.read_answers(iteration, kind="ranked")
            self.store.write_metrics(iteration, describe_ranked(ranked, answers.answers))

        on_main_process(write)
        return PairDataset.join(self.store.read_data(), self.store.read_answers(iteration, kind="ranked"))
