"""How completions become pairs, which pairs of older iterations join them, and what is told about them."""

import pyarrow as pa
import pytest
from datasets import Dataset

from spin_trl.iteration_store import COMPLETION_SCHEMA
from spin_trl.pairs import PAIR_COLUMNS, add_history, describe_pairs, make_pairs


def truths(*rows: int) -> Dataset:
    """A dataset whose prompt and ground truth tell the row that they belong to."""
    return Dataset.from_dict(
        {
            "row": list(rows),
            "prompt": [f"prompt {row}" for row in rows],
            "prompt_ids": [[10, row] for row in rows],
            "chosen_ids": [[20, row, 2] for row in rows],
        }
    )


def completions(*keys: tuple[int, int]) -> pa.Table:
    """Completions whose ids tell the row and the sample that they belong to."""
    columns = {
        "row": [row for row, _ in keys],
        "sample": [sample for _, sample in keys],
        "completion_ids": [[30, row, sample] for row, sample in keys],
        "finish_reason": ["stop"] * len(keys),
    }
    return pa.table(columns, schema=COMPLETION_SCHEMA)


def assert_joined_by_row(pairs: Dataset, keys: list[tuple[int, int]], iteration: int) -> None:
    assert pairs.column_names == PAIR_COLUMNS
    assert list(zip(pairs["row"], pairs["sample"], strict=True)) == keys
    for pair in pairs:
        assert pair["iteration"] == iteration
        assert pair["prompt_ids"] == [10, pair["row"]]
        assert pair["chosen_ids"] == [20, pair["row"], 2]
        assert pair["rejected_ids"] == [30, pair["row"], pair["sample"]]


@pytest.mark.parametrize(
    "keys",
    [
        [(0, 0), (1, 0), (2, 0)],
        [(2, 0), (0, 0), (1, 0)],
        [(1, 0), (1, 1), (0, 1), (2, 0), (0, 0), (2, 1)],
        [(2, 0)],
    ],
    ids=["in order", "in another order", "several samples", "some missing"],
)
def test_completion_is_paired_with_the_ground_truth_of_its_row(keys):
    assert_joined_by_row(make_pairs(truths(0, 1, 2), completions(*keys), iteration=4), keys, iteration=4)


def test_row_numbers_need_not_be_positions():
    """Rows 0 and 2 had prompts that were too long; what an earlier start sampled for row 2 is left out."""
    pairs = make_pairs(truths(3, 1), completions((1, 0), (2, 0), (3, 0)), iteration=0)
    assert_joined_by_row(pairs, [(1, 0), (3, 0)], iteration=0)


def test_history_takes_of_each_older_iteration_only_what_its_own_opponent_made():
    first = make_pairs(truths(0, 1), completions((0, 0), (1, 0)), iteration=0)
    second = add_history(make_pairs(truths(0, 1), completions((0, 0), (1, 0)), iteration=1), [(0, first)])
    new = make_pairs(truths(0, 1), completions((0, 0), (1, 0)), iteration=2)
    assert second["iteration"][:] == [1, 1, 0, 0]
    assert add_history(new, [(1, second)])["iteration"][:] == [2, 2, 1, 1]
    joined = add_history(new, [(0, first), (1, second)])
    assert joined["iteration"][:] == [2, 2, 0, 0, 1, 1]
    assert joined["row"][:] == [0, 1, 0, 1, 0, 1]


def test_scores_of_older_pairs_are_left_behind():
    older = make_pairs(truths(0), completions((0, 0)), iteration=0)
    scored = older.add_column("ref_chosen_logps", [-1.0]).add_column("ref_rejected_logps", [-2.0])
    new = make_pairs(truths(0), completions((0, 0)), iteration=1)
    assert add_history(new, [(0, scored)]).column_names == PAIR_COLUMNS


def test_without_history_the_pairs_stay_as_they_are():
    new = make_pairs(truths(0, 1), completions((0, 0), (1, 0)), iteration=3)
    assert add_history(new, [])[:] == new[:]


def test_description_of_pairs_by_hand():
    """Lengths 2, 1, 3, 2 against 2, 3, 1, 4; the first pair is identical, one completion of four was cut off."""
    pairs = Dataset.from_dict(
        {
            "chosen_ids": [[1, 2], [2], [1, 1, 2], [3, 2]],
            "rejected_ids": [[1, 2], [1, 1, 2], [2], [3, 2, 2, 2]],
        }
    )
    table = pa.table({"finish_reason": ["stop", "stop", "stop", "length"]})
    assert describe_pairs(pairs, table) == {
        "num_pairs": 4,
        "chosen_length": 2.0,
        "rejected_length": 2.5,
        "cut_off_share": 0.25,
        "identical_share": 0.25,
    }
