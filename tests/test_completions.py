"""That every row is completed exactly once, however the work is divided and interrupted.

The sampler is a fake, since it has to fail where we want it to and to answer in the order that we want.
"""

import random
from collections import Counter

import pytest
from conftest import all_completions
from datasets import Dataset

from spin_trl.generation.sampler import Completion, CompletionRequest, SamplerError, SamplingParams
from spin_trl.play.answers import GenerationJob
from spin_trl.run_directory.store import IterationStore


PARAMS = SamplingParams(max_completion_length=8, end_token_ids=(2,))


class FakeSampler:
    """Answers each request with its prompt and its seed's last digits; fails after `num_answers` if told to."""

    reads_checkpoints = False

    def __init__(self, num_answers: int | None = None, shuffle: bool = False):
        self.num_answers = num_answers
        self.shuffle = shuffle
        self.requests: list[CompletionRequest] = []

    def sample(self, requests, params, logprobs=False):
        if self.shuffle:
            requests = list(requests)
            random.Random(0).shuffle(requests)
        for request in requests:
            if len(self.requests) == self.num_answers:
                raise SamplerError("the server is gone")
            self.requests.append(request)
            yield Completion(request.key, [*request.prompt_ids, request.seed % 1000, 2], "stop")


@pytest.fixture
def store(tmp_path) -> IterationStore:
    return IterationStore(tmp_path)


def prompts(*rows: int) -> Dataset:
    return Dataset.from_dict({"row": list(rows), "prompt_ids": [[100 + row] for row in rows]})


def job(store: IterationStore, **overrides) -> GenerationJob:
    return GenerationJob(**{"store": store, "iteration": 0, "kind": "generations", "params": PARAMS, **overrides})


def run(generation_job: GenerationJob, sampler: FakeSampler, dataset: Dataset) -> None:
    """On one process."""
    generation_job.run(sampler, dataset, generation_job.missing_rows(dataset))


def run_on_every_rank(generation_job: GenerationJob, dataset: Dataset, num_ranks: int) -> list[FakeSampler]:
    """One rank after the other: each but the first comes so late that others have written all of their parts."""
    missing_rows = generation_job.missing_rows(dataset)
    samplers = [FakeSampler() for _ in range(num_ranks)]
    for rank, sampler in enumerate(samplers):
        generation_job.run(sampler, dataset, missing_rows, rank, num_ranks)
    return samplers


def completed_keys(store: IterationStore) -> list[tuple[int, int]]:
    table = all_completions(store, 0)
    return list(zip(table["row"].to_pylist(), table["sample"].to_pylist(), strict=True))


# Every row exactly once


@pytest.mark.parametrize(("num_rows", "num_ranks"), [(1, 5), (7, 1), (7, 2), (40, 5)])
def test_every_sample_of_every_row_is_completed_once_over_all_ranks(store, num_ranks, num_rows):
    samplers = run_on_every_rank(job(store, part_size=4, num_samples=2), prompts(*range(num_rows)), num_ranks)
    assert completed_keys(store) == [(row, sample) for row in range(num_rows) for sample in (0, 1)]
    asked = Counter(request.key for sampler in samplers for request in sampler.requests)
    assert set(asked.values()) == {1}


def test_no_rank_is_idle_where_there_are_rows_for_all(store):
    samplers = run_on_every_rank(job(store, part_size=256), prompts(*range(10)), 5)
    assert [len(sampler.requests) for sampler in samplers] == [2, 2, 2, 2, 2]


def test_completions_that_arrive_in_any_order_land_in_their_parts(store):
    run(job(store, part_size=3, num_samples=2), FakeSampler(shuffle=True), prompts(*range(7, -1, -1)))
    names = sorted(path.name[:13] for path in store.path(0, "generations").iterdir())
    assert names == ["part-00000000", "part-00000003", "part-00000006"]
    assert completed_keys(store) == [(row, sample) for row in range(8) for sample in range(2)]
    table = all_completions(store, 0)
    assert [ids[0] - 100 for ids in table["completion_ids"].to_pylist()] == table["row"].to_pylist()


# Interruptions


@pytest.mark.parametrize("num_answers", [0, 9])
def test_interrupted_run_goes_on_with_what_is_missing_and_ends_as_an_uninterrupted_one(store, tmp_path, num_answers):
    """Parts of 4: after 9 answers two parts are whole, the ninth answer is lost."""
    dataset = prompts(*range(12))
    with pytest.raises(SamplerError, match="the server is gone"):
        run(job(store, part_size=4), FakeSampler(num_answers), dataset)
    done = 4 * (num_answers // 4)
    assert set(store.completions(0, "generations").completed_rows()) == set(range(done))

    again = FakeSampler()
    run(job(store, part_size=4), again, dataset)
    assert [request.key[0] for request in again.requests] == list(range(done, 12))
    whole = IterationStore(tmp_path / "whole")
    run_on_every_rank(job(whole, part_size=5), dataset, 2)
    assert all_completions(store, 0).equals(all_completions(whole, 0))


# Requests


def test_seed_of_a_completion_repeats_and_depends_on_run_iteration_kind_row_and_sample(tmp_path):
    sampler = FakeSampler()
    for number, variant in enumerate([{}, {"seed": 1}, {"iteration": 1}, {"kind": "evaluation"}]):
        run(job(IterationStore(tmp_path / str(number)), num_samples=2, **variant), sampler, prompts(0, 1))
    found = [request.seed for request in sampler.requests]
    assert len(set(found)) == len(found) == 4 * 2 * 2
    shared = run_on_every_rank(job(IterationStore(tmp_path / "shared"), num_samples=2), prompts(0, 1), 2)
    assert [request.seed for sampler in shared for request in sampler.requests] == found[:4]
