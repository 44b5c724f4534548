"""That what a run does with its rows takes memory for a batch of them, and a few numbers for each, however many.

Measured are the peaks of Python's and Arrow's allocators, at one size and at several times as many rows. A row's lists
alone take some thousand bytes. (Up to a batch of 1,000 rows memory does grow with them.)
"""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from tiny_tokenizers import letter_tokenizer

from spin_trl.data.columns import write_rows
from spin_trl.data.pair_dataset import PairDataset, pair_lengths
from spin_trl.data.pair_metrics import describe_pairs
from spin_trl.data.pairs import (
    add_older_pairs,
    drop_identical_pairs,
    find_identical_pairs,
    make_answers,
)
from spin_trl.data.preparation import prepare_data
from spin_trl.data.token_rows import dataset_checksum, drop_duplicates, percentile_length
from spin_trl.generation.sampler import Completion, SamplingParams
from spin_trl.play.answers import GenerationJob
from spin_trl.run_directory.store import IterationStore


IDS = List(Value("int32"))
FEATURES = Features(
    row=Value("int64"), source_row=Value("int64"), prompt=Value("string"), prompt_ids=IDS, chosen_ids=IDS
)
LENGTH = 200  # tokens of each list: 800 bytes in Arrow, many times as much as a list
BYTES_A_ROW = 200


def peak(work: Callable[[], None]) -> int:
    """Bytes that Python's and Arrow's allocators held at most, together at the most."""
    default, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(default)


def growth_per_row(work: Callable[[int], None], small: int, large: int) -> float:
    work(small)  # imports, and what is kept for good
    return (peak(lambda: work(large)) - peak(lambda: work(small))) / (large - small)


class Echo:
    """Answers with the prompt, turned around."""

    def sample(self, requests, params, logprobs=False):
        for request in requests:
            yield Completion(request.key, [*request.prompt_ids[::-1], 2], "stop")


def data_of(num_rows: int, folder: Path) -> Dataset:
    """Rows whose lists differ, in a file. The answer to a fifth of them is their ground truth."""

    def rows():
        for row in range(num_rows):
            ids = [row + LENGTH, *range(1, LENGTH)]
            chosen = [*ids[::-1], 2] if row % 5 == 0 else [*ids, 2]
            yield {"row": row, "source_row": row, "prompt": f"prompt {row}", "prompt_ids": ids, "chosen_ids": chosen}

    return Dataset.from_generator(rows, features=FEATURES, cache_dir=str(folder), writer_batch_size=500)


def play_two_iterations(data: Dataset, directory: Path) -> list[int]:
    """All that is done with rows but scoring and training. Returns the numbers of pairs."""
    store = IterationStore(directory, run_id="a-run")
    store.write_data(data)
    data = store.read_data()
    for iteration in (0, 1):
        params = SamplingParams(max_completion_length=LENGTH, end_token_ids=(2,))
        job = GenerationJob(store, iteration, "generations", params, part_size=250)
        job.run(Echo(), data, job.missing_rows(data))
        parts = store.completions(iteration, "generations")
        store.answers(iteration).write(make_answers(data, parts.batches(500), iteration))
        pairs = PairDataset.join(data, store.answers(iteration).read())
        is_identical = find_identical_pairs(pairs)
        describe_pairs(pairs, is_identical, parts.batches(500), 0, 100)
        pairs = drop_identical_pairs(pairs, is_identical)
        pairs = add_older_pairs(pairs, [(i, store.read_pairs(i)) for i in range(iteration)])
        scores = pair_lengths(pairs).astype(np.float32)
        store.write_pairs(iteration, pairs.answers, {"ref_chosen_logps": scores, "ref_rejected_logps": scores})
    return [len(store.read_pairs(iteration)) for iteration in (0, 1)]


def test_pairs_are_made_described_dropped_joined_and_written_without_holding_them(tmp_path):
    def work(num_rows: int) -> None:
        name = f"{num_rows}-{len(list(tmp_path.iterdir()))}"
        data = data_of(num_rows, tmp_path / f"data-{name}")
        assert play_two_iterations(data, tmp_path / name) == [num_rows * 4 // 5, num_rows * 8 // 5]

    assert growth_per_row(work, 3000, 6000) < BYTES_A_ROW


def test_data_are_prepared_without_holding_them(tmp_path, make_config):
    schema = pa.schema([("prompt", pa.string()), ("completion", pa.string())])

    def work(num_rows: int) -> None:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.arrow"
        texts = ("".join("abcdefgh"[int(digit)] for digit in f"{row:o}") + "a" * LENGTH for row in range(num_rows))
        write_rows(path, (pa.table([[text], [text]], schema=schema) for text in texts), schema)
        data = prepare_data(make_config(), letter_tokenizer(), (1,), Dataset.from_file(str(path)), None)
        assert len(drop_duplicates(data.train)) == len(data.train)
        dataset_checksum(data.train)
        percentile_length(data.train, "chosen_ids", 99)

    assert growth_per_row(work, 2000, 4000) < BYTES_A_ROW
