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
from ..data.pairs import make_answers
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
    Evaluates the policy at the start of each iteration, where it is the opponent, and at the end of the run.

    The store has the answers to the evaluation prompts; `compute` gives the user's metrics.
    """

    policy: Policy
    store: IterationStore
    args: SPINConfig
    tokenizer: PreTrainedTokenizerBase
    compute: GenerationMetrics | None = None

    def scores(self, iteration: int, dataset: Dataset) -> dict[str, float]:
        """
        Metrics of the opponent of `iteration`, which the policy is and whose answers are on disk. Every process calls.

        Args:
            dataset ([`~datasets.Dataset`]): The run's `eval_dataset`, with `prompt` and token ids.

        Returns:
            `dict[str, float]`: `nll`, the user's, and, except for the first opponent, DPOTrainer's `rewards/` of the
            iteration that has made it.
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
        scores = self.policy.score(pairs)
        table = pa.concat_tables(pairs.batches())
        for name, logps in scores.items():
            table = table.append_column(name, pa.array(logps))
        on_main_process(lambda: self.store.evaluation_pairs(iteration).write([table]))

    def _rewards(self, iteration: int) -> dict[str, float]:
        """What an iteration has taught the policy about its opponent's answers. Nothing, if they were not kept."""
        kept = self.store.evaluation_pairs(iteration)
        if not kept.exists:
            logger.warning(f"Iteration {iteration} has no evaluation pairs on disk, so its rewards are not known.")
            return {}
        pairs = kept.read()
        logps = self.policy.score(pairs)
        logratios = {
            side: logps[f"ref_{side}_logps"] - numbers(pairs, f"ref_{side}_logps") for side in ("chosen", "rejected")
        }
        identical = np.array([a == b for a, b in zip(pairs["chosen_ids"], pairs["rejected_ids"], strict=True)])
        return reward_metrics(logratios["chosen"], logratios["rejected"], identical, self.args.beta_at(iteration))

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
        identical (`np.ndarray` of shape `(N,)`): Which pairs have equal sides. Nobody can tell these apart, so they
            count half in the accuracy, as does any other tie.
        beta (`float`): The iteration's.
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
    text. Prompts are passed as they are in the dataset.

    Args:
        dataset ([`~datasets.Dataset`]): With the columns `row`, `prompt` and `chosen_ids`.
        completions (`Iterable[pyarrow.Table]`): The answers, sorted by row.

    Raises:
        `TypeError`: if `compute` returns anything but a dict of numbers.
        `ValueError`: if one of them has the name of a metric of the run's own.
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
    """A table that is printed row by row, as its rows become known."""

    def __init__(self, print_line: Callable[[str], None] = print):
        self.print_line = print_line
        self.columns: list[str] = []

    def add(self, label: str, scores: dict[str, float]) -> None:
        """Print one row, and before the first one the header."""
        if not self.columns:
            self.columns = list(scores)
            self._print("after", self.columns)
        self._print(label, [f"{scores[name]:.4f}" if name in scores else "" for name in self.columns])

    def _print(self, label: str, cells: list[str]) -> None:
        widths = (max(len(name), len("-10000.0000")) for name in self.columns)
        padded = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        self.print_line("  ".join([label.ljust(len("iteration 100")), *padded]))
