"""Rewards of an iteration's ground truths and generations, batch by batch. Knows nothing of files and of pairs."""

import hashlib
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerState

from ...processes.progress import progress_bar
from ..columns import batches, numbers, positions_of
from .functions import RESERVED_KEYWORDS, RewardFunctions


_BATCH_SIZE = 1024  # completions that a function is given at once, whole prompts; a prompt with more comes alone
_NOT_PASSED = RESERVED_KEYWORDS | {"prompt", "completion"}  # GRPOTrainer does not pass these two either

_TIE = 1e-6  # relative to the greater of 1 and the rewards: the order of a sum's terms is no difference
_NUM_TRIED = 2  # ground truths; with one, a function that returns one number for all would pass

REWARD_COLUMNS = ("chosen_reward", "rejected_reward")  # of the ground truth and of the generation


class AnswerRewards:
    """
    Judges what an opponent has answered, and the ground truths beside it.

    Functions see the ground truths first, then the generations, each as GRPOTrainer shows completions: text for a text
    prompt, otherwise a list of one assistant message, decoded without special tokens. Keyword arguments are the columns
    of the user's dataset, `completion_ids`, `trainer_state`, and `ground_truth`, the text of each row's ground truth
    (unless a column has that name). The `source` is the user's dataset, whose rows are numbered by `source_row`.
    """

    def __init__(
        self, functions: RewardFunctions, tokenizer: PreTrainedTokenizerBase, source: Dataset, num_generations: int
    ):
        self.functions = functions
        self.tokenizer = tokenizer
        columns = [name for name in source.column_names if name not in _NOT_PASSED]
        self.source = source.with_format(None).select_columns(columns)
        self.num_generations = num_generations
        self.batch_size = max(1, _BATCH_SIZE // num_generations) * num_generations

    def add(
        self, data: Dataset, answers: Iterable[pa.Table], state: TrainerState, iteration: int
    ) -> Iterator[pa.Table]:
        """
        Answers as [`pairs.make_answers`] gives them, sorted by row, with `REWARD_COLUMNS`. Functions are shown the
        `state` of the trainer.
        """
        rows = numbers(data, "row")
        self._reset()
        total = len(data) * self.num_generations
        with progress_bar(total=total, desc=f"Iteration {iteration}: rewards", unit=" completions") as bar:
            for batch in answers:
                started = time.monotonic()
                rewarded = self._judge(data, rows, batch.combine_chunks(), state)
                self._seconds += time.monotonic() - started
                bar.update(len(batch))
                yield rewarded

    def try_on(self, data: Dataset) -> None:
        """Have the first ground truths judged, to know of what a function cannot take before anything is generated."""
        self._reset()
        self._judge_truths(data.select(range(min(_NUM_TRIED, len(data))))[:], TrainerState())
        self.functions.take_logged()

    def checksum(self, source_rows: np.ndarray) -> str:
        """Of all columns that functions are given with these rows: 16 hexadecimal digits."""
        digest = hashlib.blake2b(source_rows.astype(np.int64).tobytes(), digest_size=8)
        if columns := self.source.column_names:
            for batch in batches(self.source.select(source_rows), columns):
                digest.update(repr(batch.to_pydict()).encode())
        return digest.hexdigest()

    def take_metrics(self) -> dict[str, float]:
        """What the functions said of all that was judged since `add` was called, each on its own, and how long."""
        metrics = {"seconds_rewards": self._seconds, **self.functions.take_logged()}
        for kind, batches_said in self._said.items() if len(self.functions.names) > 1 else ():
            for name, said in zip(self.functions.names, np.concatenate(batches_said).T, strict=True):
                if not np.isnan(said).all():
                    metrics[f"rewards/{name}/{kind}"] = float(np.nanmean(said))
        return metrics

    def _judge(self, data: Dataset, rows: np.ndarray, batch: pa.Table, state: TrainerState) -> pa.Table:
        found, of_row = np.unique(batch["row"].to_numpy(), return_inverse=True)
        truths = data.select(positions_of(found, rows)[0])[:]
        truth_rewards, columns = self._judge_truths(truths, state)
        prompts = [truths["prompt"][i] for i in of_row]
        columns = {name: [values[i] for i in of_row] for name, values in columns.items()}
        answer_rewards = self._ask("generations", prompts, batch["rejected_ids"].to_pylist(), columns, state)
        for name, rewards in zip(REWARD_COLUMNS, (truth_rewards[of_row], answer_rewards), strict=True):
            batch = batch.append_column(name, pa.array(rewards, from_pandas=True))  # null where there is none
        return batch

    def _judge_truths(self, truths: dict[str, list], state: TrainerState) -> tuple[np.ndarray, dict[str, list]]:
        """Rewards of shape `(num_truths,)`, and the columns that functions are given."""
        texts = self.tokenizer.batch_decode(truths["chosen_ids"], skip_special_tokens=True)
        columns = {"ground_truth": texts, **self.source.select(truths["source_row"])[:]}
        return self._ask("truths", truths["prompt"], truths["chosen_ids"], columns, state), columns

    def _ask(self, kind: str, prompts: list, ids: list, columns: dict[str, list], state: TrainerState) -> np.ndarray:
        completions: list[Any] = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, self.tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True)
        ]
        rewards, each = self.functions(list(prompts), completions, list(ids), trainer_state=state, **columns)
        self._said[kind].append(each)
        return rewards

    def _reset(self) -> None:
        self._said: dict[str, list[np.ndarray]] = defaultdict(list)  # (completions, functions) each
        self._seconds = 0.0


def describe_rewards(answers: Dataset) -> dict[str, float]:
    """
    Rewards of the ground truths beside those of the generations, of answers that are sorted by row: means over prompts
    and over generations, as far as there are rewards; the shares of prompts whose best generation beats the ground
    truth, or comes to the same; and the share of both kinds that has no reward.
    """
    truth, generation = (numbers(answers, name) for name in REWARD_COLUMNS)
    starts = group_starts(numbers(answers, "row"))
    truth, best = truth[starts], np.fmax.reduceat(generation, starts)
    is_known = ~np.isnan(truth) & ~np.isnan(best)
    beaten = exceeds(best, truth)
    described = {
        "beaten_truths_share": float(beaten.mean()),
        "tied_truths_share": float((is_known & ~beaten & ~exceeds(truth, best)).mean()),
        "unjudged_share": float(np.isnan(np.concatenate([truth, generation])).mean()),
    }
    for name, rewards in (("truth_reward", truth), ("generation_reward", generation)):
        if not np.isnan(rewards).all():
            described[name] = float(np.nanmean(rewards))
    return described


def exceeds(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Where the left reward is the greater one, by more than rounding. Not-a-number exceeds nothing."""
    return left - right > _TIE * np.maximum(1.0, np.maximum(np.abs(left), np.abs(right)))


def group_starts(rows: np.ndarray) -> np.ndarray:
    """Where each row's answers begin, `rows` being sorted."""
    return np.flatnonzero(np.concatenate([[True], rows[1:] != rows[:-1]]))
