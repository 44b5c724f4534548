"""`HeldOutEvaluation`: what an opponent is worth on `eval_dataset`, and whether it has beaten the one before it.

Knows nothing of how the answers are generated.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Real

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data.columns import batches, numbers
from ..data.pair_dataset import PairDataset
from ..data.pairs import find_identical_pairs, make_answers
from ..policy.policy import Policy
from ..processes.ranks import on_main_process
from ..run_directory.store import IterationStore
from ..spin_config import SPINConfig
from .best_iteration import check_is_evaluated
from .metric_names import EVALUATION_METRICS


logger = logging.getLogger(__name__)

# (prompts, references, generations) -> metrics
GenerationMetrics = Callable[[list, list[str], list[str]], dict[str, float]]


@dataclass
class HeldOutEvaluation:
    """
    Evaluates the policy at the start of each iteration, where it is the opponent, and at the end of the run, by its
    answers to the evaluation prompts, which the store has. `compute` gives the user's metrics.
    """

    policy: Policy
    store: IterationStore
    args: SPINConfig
    tokenizer: PreTrainedTokenizerBase
    compute: GenerationMetrics | None = None

    def scores(self, iteration: int, dataset: Dataset) -> dict[str, float]:
        """
        Metrics of the opponent of `iteration`, which the policy is and whose answers are on disk: `nll`, the user's,
        and, except for the first opponent, DPOTrainer's `rewards/` of the iteration that has made it. Every process
        calls it, with the run's evaluation data.
        """
        rewards = self._rewards(iteration - 1) if iteration > 0 else {}
        self._keep_pairs(iteration, dataset)
        nll = self.policy.nll(dataset)
        return {"nll": nll, **on_main_process(lambda: self._users_metrics(iteration, dataset)), **rewards}

    def _keep_pairs(self, iteration: int, dataset: Dataset) -> None:
        """The answers with the opponent's log-probs: once the next policy is to tell them apart, it is gone."""
        completions = self.store.completions(iteration, "evaluation").batches()
        answers = Dataset(pa.concat_tables(make_answers(dataset, completions, iteration)))
        pairs = PairDataset.join(dataset, answers)
        table = pa.concat_tables(pairs.batches())
        for name, logps in self.policy.score(pairs).items():
            table = table.append_column(name, pa.array(logps))
        on_main_process(lambda: self.store.evaluation_pairs(iteration).write([table]))

    def _rewards(self, iteration: int) -> dict[str, float]:
        """What an iteration has taught the policy about its opponent's answers. Nothing, if they were not kept."""
        kept = self.store.evaluation_pairs(iteration)
        if not kept.exists:
            logger.warning(f"Iteration {iteration} has no evaluation pairs on disk, so its rewards are not known.")
            return {}
        pairs = kept.read()
        chosen, rejected = (logps - numbers(pairs, name) for name, logps in self.policy.score(pairs).items())
        return reward_metrics(chosen, rejected, find_identical_pairs(pairs), self.args.beta_at(iteration))

    def _users_metrics(self, iteration: int, dataset: Dataset) -> dict[str, float]:
        if self.compute is None:
            return {}
        completions = self.store.completions(iteration, "evaluation").batches()
        try:
            found = generation_metrics(self.compute, dataset, completions, self.tokenizer)
        except Exception as error:
            error.add_note(
                f"In `compute_generation_metrics`, for the opponent of iteration {iteration}. Its answers are on disk: "
                "correct the function and resume the run."
            )
            raise
        check_is_evaluated(self.args, found)
        return found


def reward_metrics(
    chosen_logratios: np.ndarray, rejected_logratios: np.ndarray, identical: np.ndarray, beta: float
) -> dict[str, float]:
    """
    DPOTrainer's reward metrics, over all held-out pairs at once.

    Args:
        chosen_logratios, rejected_logratios (`np.ndarray` of shape `(N,)`): `log p - log p_t` of each side, in nats.
        identical (`np.ndarray` of shape `(N,)`): Which pairs have equal sides. They count half in the accuracy, as does
            any other tie.
    """
    chosen, rejected = beta * chosen_logratios.astype(np.float64), beta * rejected_logratios.astype(np.float64)
    tied = identical | (chosen == rejected)
    return {
        "rewards/chosen": float(chosen.mean()),
        "rewards/rejected": float(rejected.mean()),
        "rewards/accuracies": float(np.where(tied, 0.5, chosen > rejected).mean()),
        "rewards/margins": float((chosen - rejected).mean()),
    }


def generation_metrics(
    compute: GenerationMetrics, dataset: Dataset, completions: Iterable[pa.Table], tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """
    The user's metrics over the answers to the evaluation prompts, which have to fit into memory.

    References and generations are both decoded from token ids, without special tokens, so that equal ids give equal
    text. Prompts are passed as they are in the dataset. The completions are sorted by row. `TypeError` if `compute`
    returns anything but a dict of numbers, `ValueError` if one of them has the name of a metric of the run's own.
    """
    rows = dataset.select(np.argsort(numbers(dataset, "row"), kind="stable"))

    def texts(tables: Iterable[pa.Table], column: str) -> list[str]:
        ids = (table[column].to_pylist() for table in tables)
        return [text for batch in ids for text in tokenizer.batch_decode(batch, skip_special_tokens=True)]

    references = texts(batches(rows, ["chosen_ids"]), "chosen_ids")
    metrics = compute(list(rows["prompt"]), references, texts(completions, "completion_ids"))
    if not isinstance(metrics, dict) or not all(isinstance(value, Real) for value in metrics.values()):
        raise TypeError(
            f"`compute_generation_metrics` must return a dict of numbers, such as {{'accuracy': 0.5}}, got {metrics!r}."
        )
    if taken := sorted(EVALUATION_METRICS.keys() & metrics.keys()):
        raise ValueError(
            f"`compute_generation_metrics` returned {taken}, which are names of the run's own metrics. Give yours "
            "other names."
        )
    return {name: float(value) for name, value in metrics.items()}


class ScoreTable:
    """A table that is printed row by row, as its rows become known, and before the first one its header."""

    def __init__(self, print_line: Callable[[str], None] = print):
        self.print_line = print_line
        self.widths: dict[str, int] = {}

    def add(self, label: str, scores: dict[str, float]) -> None:
        if not self.widths:
            self.widths = {name: max(len(name), len("-10000.0000")) for name in scores}
            self._print("after", {name: name for name in scores})
        self._print(label, {name: f"{score:.4f}" for name, score in scores.items()})

    def _print(self, label: str, cells: dict[str, str]) -> None:
        padded = [cells.get(name, "").rjust(width) for name, width in self.widths.items()]
        self.print_line("  ".join([label.ljust(len("iteration 100")), *padded]))
