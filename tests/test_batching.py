"""Which pairs are computed together."""

import numpy as np
import pytest
from datasets import Dataset

from spin_trl.data.batching import epoch_order, scoring_batches
from spin_trl.data.pair_dataset import PairDataset, pair_lengths


def lognormal_lengths(num_pairs: int) -> np.ndarray:
    return np.random.default_rng(0).lognormal(4, 0.7, num_pairs).astype(int) + 1


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_length_of_a_pair_is_that_of_its_longer_sequence_as_truncated():
    pairs = Dataset.from_dict(
        {"prompt_ids": [[1, 2], [1], [1]], "chosen_ids": [[3], [3, 4, 5], []], "rejected_ids": [[6, 7], [6], [6]]}
    )
    assert pair_lengths(pairs).tolist() == [4, 4, 2]
    assert pair_lengths(pairs, max_length=3).tolist() == [3, 3, 2]
    assert pair_lengths(pairs.select([2, 0])).tolist() == [2, 4]
    assert pair_lengths(pairs.select([])).tolist() == []
    joined = PairDataset(pairs.select_columns(["prompt_ids", "chosen_ids"]), pairs.select_columns(["rejected_ids"]))
    assert pair_lengths(joined).tolist() == [4, 4, 2]
    with_initial = pairs.add_column("initial_ids", [[8], [8], [8, 8, 8, 8]])
    assert pair_lengths(with_initial).tolist() == [4, 4, 5]


@pytest.mark.parametrize("is_grouped", [True, False])
def test_epoch_takes_every_pair_and_fills_the_last_batch_with_the_first_ones(is_grouped):
    lengths = lognormal_lengths(1003)
    order = epoch_order(1003, 16, generator(), lengths if is_grouped else None)
    assert len(order) == 63 * 16
    assert sorted(order[:1003]) == list(range(1003))
    assert order[1003:].tolist() == order[:5].tolist()


def test_epoch_without_its_incomplete_batch():
    order = epoch_order(7, 3, generator(), drop_last=True)
    assert len(order) == len(set(order.tolist())) == 6
    assert sorted(epoch_order(2, 3, generator(), drop_last=True)[:2]) == [0, 1]


def test_without_a_generator_pairs_stay_in_their_order():
    assert epoch_order(5, 2, None, np.arange(5)).tolist() == [0, 1, 2, 3, 4, 0]
    assert epoch_order(2, 5, None).tolist() == [0, 1, 0, 1, 0]  # fewer than a batch are repeated


def test_order_follows_from_the_seed():
    lengths = lognormal_lengths(100)
    first, again, other = (epoch_order(100, 8, generator(seed), lengths).tolist() for seed in (0, 0, 1))
    assert first == again != other


def test_grouping_computes_less_than_a_tenth_of_padding_where_random_batches_compute_more_than_all():
    """Tokens of padding for each real token, in micro-batches of 8, of pairs with log-normal lengths."""
    lengths = lognormal_lengths(4000)

    def padding(order: np.ndarray) -> float:
        batches = lengths[order].reshape(-1, 8)
        return 8 * batches.max(axis=1).sum() / batches.sum() - 1

    assert padding(epoch_order(4000, 32, generator(), lengths)) < 0.1
    assert padding(epoch_order(4000, 32, generator())) > 1


def test_grouped_batches_do_not_come_in_order_of_their_length():
    lengths = lognormal_lengths(4000)
    longest = lengths[epoch_order(4000, 8, generator(), lengths)].reshape(-1, 8).max(axis=1)
    assert abs(np.corrcoef(longest[:-1], longest[1:])[0, 1]) < 0.15


def test_scoring_batches_hold_no_more_tokens_than_allowed_the_longest_first():
    """Both sides padded: 2 * 2 * 10 = 40 tokens, then 2 * 4 * 5 = 40, then what is left."""

    def batches(lengths: list[int], **limits) -> list[list[int]]:
        return [batch.tolist() for batch in scoring_batches(np.array(lengths), **limits)]

    assert batches([1, 10, 5, 9, 5, 5, 5, 2], max_tokens=40) == [[1, 3], [2, 4, 5, 6], [7, 0]]
    assert batches([3, 30], max_tokens=12) == [[1], [0]]  # longer than a batch
    assert batches([1, 2, 3], max_pairs=2) == [[2, 1], [0]]
