"""`RunData`: the rows that a run plays on, as token ids, and no longer than what is to hold them. Knows no models."""

from dataclasses import dataclass, field
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset

from ..data.preferences import PreparedPreferences
from ..data.preparation import PreparedData, dataset_checksum, drop_long_prompts, percentile_length
from ..processes.ranks import main_process_first


logger = get_logger(__name__)


@dataclass
class RunData:
    """
    Args:
        train, eval ([`~datasets.Dataset`]): Prompts and ground truths, see [`rendering.TokenizedData`].
        preferences ([`~datasets.Dataset`], *optional*): The user's preference pairs, see [`PreparedPreferences`].
        report (`dict[str, Any]`): Format and row counts, for `self_play.json`.
        invalid_rows (`list[dict]`): Which rows were left out as invalid, and why.
        num_dropped (`int`): How many rows were left out because their prompt leaves no room for an answer.
    """

    train: Dataset
    eval: Dataset | None
    preferences: Dataset | None = None
    report: dict[str, Any] = field(default_factory=dict)
    invalid_rows: list[dict[str, Any]] = field(default_factory=list)
    num_dropped: int = 0

    @classmethod
    def of(cls, data: PreparedData, preferences: PreparedPreferences | None) -> "RunData":
        run_data = cls(data.train, data.eval, report=data.report, invalid_rows=data.invalid_rows)
        if preferences is not None:
            run_data.preferences = preferences.dataset
            run_data.report |= preferences.report
            run_data.invalid_rows += preferences.invalid_rows
        return run_data

    def fit_to(self, max_length: int, source: str) -> None:
        """Drop prompts that leave no room for a token in `max_length`, which `source` sets. Every process calls it."""
        reason = f"{source} ({max_length} tokens)"

        def drop() -> int:
            self.train, num_dropped = drop_long_prompts(self.train, max_length - 1, reason)
            if self.eval is not None:
                self.eval, num_dropped_eval = drop_long_prompts(self.eval, max_length - 1, reason)
                num_dropped += num_dropped_eval
            return num_dropped

        num_dropped = main_process_first(drop)
        self.num_dropped += num_dropped
        if num_dropped > 0:
            logger.warning(f"Dropped {num_dropped} row(s) whose prompt leaves no room for an answer in {reason}.")

    @property
    def min_context_length(self) -> int:
        """Tokens that the shortest prompt and one token of an answer take."""
        return 1 + min(percentile_length(dataset, "prompt_ids", 0) for dataset in self._datasets)

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt."""
        return max(percentile_length(dataset, "prompt_ids", 100) for dataset in self._datasets)

    def describe(self) -> dict[str, Any]:
        """For `self_play.json`."""
        return {
            **self.report,
            "train_checksum": dataset_checksum(self.train),
            "eval_checksum": None if self.eval is None else dataset_checksum(self.eval),
            "num_train_rows": len(self.train),
            "num_dropped_rows": self.num_dropped,
            "num_eval_rows": 0 if self.eval is None else len(self.eval),
        }

    @property
    def _datasets(self) -> list[Dataset]:
        return [self.train] if self.eval is None else [self.train, self.eval]
