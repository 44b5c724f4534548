"""Completions of a whole dataset, written to the run directory part by part. Knows nothing of models or HTTP."""

import hashlib
import math
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from ..data.columns import batches, numbers
from ..data.draw import OPPONENT, OpponentDraw
from ..generation.sampler import Completion, CompletionRequest, OpponentSampler, SamplingParams
from ..processes.progress import progress_bar
from ..processes.ranks import raise_if_another_failed
from ..run_directory.store import IterationStore


@dataclass
class GenerationJob:
    """
    Completions of every prompt of a dataset, those that are missing on disk.

    Args:
        kind (`str`): "generations" or "evaluation".
        part_size (`int`): Prompts per part; fewer if there would be less than one part for each process.
        seed (`int`): The run's, from which each completion's own is derived.
        draw ([`OpponentDraw`], *optional*): Who answers which prompt. By default the newest opponent all of them.
    """

    store: IterationStore
    iteration: int
    kind: str
    params: SamplingParams
    num_samples: int = 1
    part_size: int = 256
    seed: int = 0
    draw: OpponentDraw | None = None

    def missing_rows(self, prompts: Dataset) -> np.ndarray:
        """Rows of `prompts` whose completions are not on disk yet, in ascending order."""
        done = self.store.completions(self.iteration, self.kind).completed_rows()
        return np.setdiff1d(numbers(prompts, "row"), done)

    def run(
        self, sampler: OpponentSampler, prompts: Dataset, missing_rows: np.ndarray, index: int = 0, count: int = 1
    ) -> None:
        """
        Sample the share of process number `index` of `count`. The prompts have the columns `row` and `prompt_ids`. All
        processes must agree on the `missing_rows`, so these have to be found before the first of them writes a part.
        """
        size = max(1, min(self.part_size, math.ceil(len(missing_rows) / count)))
        parts = [missing_rows[start : start + size] for start in range(0, len(missing_rows), size)][index::count]
        first_rows = [int(part[0]) for part in parts]
        own_rows = np.concatenate([np.empty(0, np.int64), *parts])
        collected: dict[int, list[Completion]] = defaultdict(list)
        total, name = len(own_rows) * self.num_samples, f"Iteration {self.iteration}: {self.kind}"
        started, num_tokens = time.monotonic(), 0
        with progress_bar(total=total, desc=name, unit=" completions", disable=index > 0 or total == 0) as bar:
            for completion in sampler.sample(self._requests(prompts, own_rows), self.params):
                raise_if_another_failed()
                num_tokens += len(completion.token_ids)
                bar.set_postfix_str(f"{num_tokens / (time.monotonic() - started):.0f} tokens/s", refresh=False)
                bar.update()
                number = bisect_right(first_rows, completion.key[0]) - 1
                collected[number].append(completion)
                if len(collected[number]) == len(parts[number]) * self.num_samples:
                    self._write(first_rows[number], collected.pop(number))

    def _requests(self, prompts: Dataset, rows: np.ndarray) -> Iterator[CompletionRequest]:
        prompts = prompts.select(np.flatnonzero(np.isin(numbers(prompts, "row"), rows)))
        for batch in batches(prompts, ["row", "prompt_ids"]):
            for prompt in batch.to_pylist():
                opponent = None if self.draw is None else self.draw.of_row(prompt["row"])
                for sample in range(self.num_samples):
                    key = (prompt["row"], sample)
                    yield CompletionRequest(key, prompt["prompt_ids"], self._seed_of(key), opponent)

    def _seed_of(self, key: tuple[int, int]) -> int:
        """A seed of its own for every completion, such that repeating it repeats the completion."""
        source = repr((self.seed, self.iteration, self.kind, *key)).encode()
        return int.from_bytes(hashlib.blake2b(source, digest_size=4).digest())

    def _write(self, first_row: int, completions: list[Completion]) -> None:
        completions.sort(key=lambda completion: completion.key)
        columns = {
            "row": [completion.key[0] for completion in completions],
            "sample": [completion.key[1] for completion in completions],
            "completion_ids": [completion.token_ids for completion in completions],
            "finish_reason": [completion.finish_reason for completion in completions],
        }
        if self.draw is not None:
            columns[OPPONENT] = [self.draw.of_row(completion.key[0]) for completion in completions]
        self.store.completions(self.iteration, self.kind).write(first_row, columns)
