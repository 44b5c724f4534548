"""The numbers of an iteration, by hand."""

import numpy as np
import pyarrow as pa
import pytest
from conftest import completion_table
from datasets import Dataset

from spin_trl.data.pair_dataset import PairDataset
from spin_trl.data.pair_metrics import describe_pairs, describe_scores, distinct, generation_rates


def completions(*answers: tuple[list[int], str]) -> list[pa.Table]:
    """Ids and finish reasons, in batches of two."""
    table = completion_table([(row, 0) for row in range(len(answers))], *map(list, zip(*answers, strict=True)))
    return [table.slice(start, 2) for start in range(0, len(table), 2)]


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        ([[1, 2, 1], [1]], 1, 2 / 4),
        ([[1, 2, 1], [2, 1]], 2, 2 / 3),  # (1, 2), (2, 1) and (2, 1); no (1, 2) from one text to the next
        ([[1], [], [2]], 2, 0.0),
        ([[300_000, 1], [1, 300_000]], 2, 1.0),
    ],
)
def test_distinct_counts_different_ngrams_within_texts(texts, n, expected):
    lists = pa.array([[9, 9], *texts], pa.list_(pa.int32()))
    assert distinct(lists.slice(1), n) == pytest.approx(expected)


def test_rates_count_what_was_sampled_in_this_time_alone():
    """Rows 1 and 2 took four seconds and have three and one tokens; row 0 was there already."""
    table = completions(([1] * 9, "length"), ([1, 1, 2], "stop"), ([2], "stop"))
    assert generation_rates(table, [1, 2], 4.0) == {"completions_per_second": 0.5, "tokens_per_second": 1.0}
    assert generation_rates(table, [], 4.0) == {}


def pairs_of(*sides: tuple[list[int], list[int]], **columns: list) -> PairDataset:
    prompts, chosen, rejected = [[9, 9]] * len(sides), [side for side, _ in sides], [side for _, side in sides]
    truths = Dataset.from_dict({"prompt_ids": prompts, "chosen_ids": chosen})
    return PairDataset(truths, Dataset.from_dict({"rejected_ids": rejected, **columns}))


def test_pairs_are_described_by_hand():
    """
    Lengths 1, 2, 3 and 5, 1, 1: percentiles between neighbours are linear. With a prompt of 2, four tokens hold all
    chosen sides but the third, and all rejected ones but the first. Of the completions the first and the last say
    nothing; one word that was cut off is not nothing.
    """
    pairs = pairs_of(([1], [4, 4, 4, 4, 2]), ([1, 2], [2]), ([1, 2, 3], [2]))
    table = completions(([2], "stop"), ([5], "length"), ([5, 2], "stop"), ([5], "length"), ([], "length"))
    described = {
        "num_pairs": 3,
        "identical_share": 1 / 3,
        "empty_share": 2 / 5,
        "cut_off_share": 3 / 5,
        "distinct_1": 2 / 7,
        "distinct_2": 2 / 4,
        "chosen_distinct_1": 3 / 6,
        "chosen_distinct_2": 2 / 3,
        "chosen_length": 2.0,
        "chosen_lengths": {"p10": 1.2, "p50": 2.0, "p90": 2.8},
        "chosen_truncated_share": 1 / 3,
        "rejected_length": 7 / 3,
        "rejected_lengths": {"p10": 1.0, "p50": 1.0, "p90": 4.2},
        "rejected_truncated_share": 1 / 3,
    }
    is_identical = np.array([False, True, False])
    assert describe_pairs(pairs, is_identical, table, seed=0, max_length=4) == described
    untruncated = {"chosen_truncated_share": 0.0, "rejected_truncated_share": 0.0}
    assert describe_pairs(pairs, is_identical, table, seed=0, max_length=None) == described | untruncated


def test_distinct_looks_at_the_same_two_thousand_pairs_in_every_iteration():
    """Of one token in all pairs, the share of different ones is one of as many as are looked at."""
    first, later = (
        describe_pairs(pairs, np.zeros(4000, bool), completions(([1], "stop")), seed=3, max_length=None)
        for pairs in (pairs_of(*(([row // 2], [said]) for row in range(4000))) for said in (7, 8))
    )
    assert first["distinct_1"] == later["distinct_1"] == 1 / 2000
    assert first["chosen_distinct_1"] == later["chosen_distinct_1"] not in (0.5, 1.0)


def describe(pairs: PairDataset, *args, **kwargs) -> dict[str, float]:
    """Of pairs that hold their scores."""
    scores = {name: np.array(pairs[name], np.float32) for name in ("ref_chosen_logps", "ref_rejected_logps")}
    return describe_scores(pairs, scores, *args, **kwargs)


def scored(*logps: tuple[float, float]) -> dict[str, list]:
    return {
        "ref_chosen_logps": [float(chosen) for chosen, _ in logps],
        "ref_rejected_logps": [float(rejected) for _, rejected in logps],
    }


def test_gap_is_per_token_and_of_the_iterations_own_pairs():
    """-4/2 + 3/1 = 1 and -6/3 + 6/2 = 1; one identical pair was left out: 2 over 3. The third is history."""
    pairs = pairs_of(
        ([1, 2], [1]),
        ([1, 2, 2], [3, 4]),
        ([1], [2]),
        **scored((-4, -3), (-6, -6), (-100, -1)),
        iteration=[2, 2, 1],
    )
    described = describe(pairs, 2, num_identical_dropped=1, max_length=None, truncation_mode="keep_start")
    assert described == pytest.approx({"logps_gap": 2 / 3, "opponent_nll": 10 / 5})
    alone = describe(pairs.select([0]), 2, 0, None, "keep_start")
    assert alone == pytest.approx({"logps_gap": 1.0, "opponent_nll": 2.0})


@pytest.mark.parametrize(("truncation_mode", "chosen", "rejected"), [("keep_start", 2, 1), ("keep_end", 3, 1)])
def test_only_tokens_that_were_scored_count(truncation_mode, chosen, rejected):
    """A prompt of 2 and four tokens in all: the start of the chosen side, or all but the first of its last four."""
    pairs = pairs_of(([1] * 6, [1]), **scored((-6, -3)), iteration=[0])
    described = describe(pairs, 0, 0, max_length=4, truncation_mode=truncation_mode)
    assert described == pytest.approx({"logps_gap": -6 / chosen + 3 / rejected, "opponent_nll": 6 / chosen})


def test_side_without_tokens_has_no_gap():
    pairs = pairs_of(([1], []), ([1, 2], [2]), **scored((-1, 0), (-2, -3)), iteration=[0, 0])
    assert describe(pairs, 0, 0, None, "keep_start") == pytest.approx({"logps_gap": 2.0, "opponent_nll": 1.0})
    assert describe(pairs.select([0]), 0, 0, None, "keep_start") == {"opponent_nll": 1.0}
