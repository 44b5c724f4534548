"""How completions become pairs, which pairs of older iterations join them, and what is told about them."""

import pyarrow as pa
import pytest
import torch
from conftest import completion_table
from datasets import Dataset
from test_pair_metrics import pairs_of
from trl.trainer.dpo_trainer import DataCollatorForPreference

from spin_trl.data.pair_dataset import TRUTH_COLUMNS, PairDataset
from spin_trl.data.pairs import (
    ANSWER_SCHEMA,
    NoPairsError,
    add_older_pairs,
    drop_identical_pairs,
    find_identical_pairs,
    make_answers,
)
from spin_trl.objectives import OBJECTIVES
from spin_trl.objectives.settings import keeps_identical_pairs


def truths(*rows: int) -> Dataset:
    """A dataset whose prompt and ground truth tell the row that they belong to."""
    return Dataset.from_dict(
        {
            "row": list(rows),
            "source_row": [100 + row for row in rows],
            "prompt": [f"prompt {row}" for row in rows],
            "prompt_ids": [[10, row] for row in rows],
            "chosen_ids": [[20, row, 2] for row in rows],
        }
    )


def completions(*keys: tuple[int, int]) -> pa.Table:
    """Completions whose ids tell the row and the sample that they belong to."""
    return completion_table(list(keys), [[30, row, sample] for row, sample in keys])


def make_pairs(data: Dataset, table: pa.Table, iteration: int) -> PairDataset:
    """The completions come in two batches, as they do from disk."""
    batches = [table.slice(0, 1), table.slice(1)]
    return PairDataset.join(data, Dataset(pa.concat_tables(make_answers(data, batches, iteration))))


def assert_joined_by_row(pairs: PairDataset, keys: list[tuple[int, int]], iteration: int) -> None:
    assert pairs.column_names == [*ANSWER_SCHEMA.names, *TRUTH_COLUMNS]
    assert list(zip(pairs["row"], pairs["sample"], strict=True)) == keys
    for pair in pairs:
        assert pair["iteration"] == iteration
        assert pair["source_row"] == 100 + pair["row"]
        assert pair["prompt_ids"] == [10, pair["row"]]
        assert pair["chosen_ids"] == [20, pair["row"], 2]
        assert pair["rejected_ids"] == [30, pair["row"], pair["sample"]]


@pytest.mark.parametrize(
    ("rows", "given", "keys"),
    [
        ((0, 1, 2), [(1, 0), (1, 1), (0, 1), (2, 0), (0, 0), (2, 1)], slice(None)),
        ((0, 1, 2), [(2, 0)], slice(None)),
        ((3, 1), [(1, 0), (2, 0), (3, 0)], slice(0, 3, 2)),
    ],
    ids=[
        "several samples in some order",
        "some missing",
        "numbers that are no positions, one left out since",
    ],
)
def test_completion_is_paired_with_the_ground_truth_of_its_row(rows, given, keys):
    assert_joined_by_row(make_pairs(truths(*rows), completions(*given), iteration=4), given[keys], iteration=4)


def test_history_takes_of_each_older_iteration_only_what_its_own_opponent_made():
    """Their scores are left behind."""
    first = make_pairs(truths(0, 1), completions((0, 0), (1, 0)), iteration=0)
    first = PairDataset(first.truths, first.answers.add_column("ref_chosen_logps", [-1.0, -2.0]))
    second = add_older_pairs(make_pairs(truths(0, 1), completions((0, 0), (1, 0)), iteration=1), [(0, first)])
    new = make_pairs(truths(0, 1), completions((0, 0), (1, 0)), iteration=2)
    assert second["iteration"][:] == [1, 1, 0, 0]
    assert add_older_pairs(new, [(1, second)])["iteration"][:] == [2, 2, 1, 1]
    joined = add_older_pairs(new, [(0, first), (1, second)])
    assert joined["iteration"][:] == [2, 2, 0, 0, 1, 1]
    assert joined["row"][:] == [0, 1, 0, 1, 0, 1] and joined.column_names == new.column_names


def test_answers_of_no_words_make_pairs_that_dpos_collator_takes():
    """One opponent ended at once (its end token, 2), the other was cut off before it said anything."""
    table = completion_table([(0, 0), (1, 0)], [[2], []], ["stop", "length"])
    pairs = make_pairs(truths(0, 1), table, iteration=0)
    assert pairs["rejected_ids"][:] == [[2], []]
    batch = DataCollatorForPreference(pad_token_id=9, max_length=8)(list(pairs))
    assert batch["input_ids"].tolist() == [[10, 0, 20, 0, 2], [10, 1, 20, 1, 2], [10, 0, 2, 9, 9], [10, 1, 9, 9, 9]]
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 1, 1]] * 2 + [[0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]


# Identical pairs


def test_pairs_that_differ_in_one_token_or_their_order_stay():
    identical = [([1, 2], [1, 2]), ([2], [2]), ([], []), ([3, 3], [3, 3])]
    others = [([1, 2], [1]), ([1, 2], [1, 2, 2]), ([1], [2]), ([1, 2], [2, 1]), ([], [1]), ([1, 2, 3], [1, 2, 4])]
    pairs = pairs_of(*[*identical, *others] * 250, row=list(range(2500)))  # more than are read at a time
    is_identical = find_identical_pairs(pairs)
    assert is_identical.tolist() == ([True] * 4 + [False] * 6) * 250
    assert drop_identical_pairs(pairs, is_identical)["row"][:6] == [4, 5, 6, 7, 8, 9]


def test_iteration_of_identical_pairs_alone_is_stopped_with_what_it_means():
    pairs = pairs_of(([1, 2], [1, 2]), ([2], [2]))
    with pytest.raises(NoPairsError, match="in all 2 pairs.*converged.*`identical_pairs='keep'`"):
        drop_identical_pairs(pairs, find_identical_pairs(pairs))


@pytest.mark.parametrize("loss_type", sorted(OBJECTIVES))
def test_identical_pairs_are_dropped_if_and_only_if_a_batch_is_the_same_without_them(loss, loss_type):
    """The summed gradient of two pairs, one with the same answer `u` on both sides, against that of the other alone."""
    differences = []
    initial = [torch.tensor([-4.0])] if loss_type == "t_spin" else []  # which a pair of equal sides is held against
    for ref_chosen in (-55.0, 45.0):
        u, chosen, rejected = sides = [torch.tensor([logp], requires_grad=True) for logp in (-3.0, -4.0, -6.0)]
        of_u, ref_chosen, ref_rejected = torch.tensor([-5.0]), torch.tensor([ref_chosen]), torch.tensor([-5.0])
        both = torch.cat([u, chosen]), torch.cat([u, rejected]), *(side.repeat(2) for side in initial)
        both_refs = torch.cat([of_u, ref_chosen]), torch.cat([of_u, ref_rejected])
        with_it = 2 * loss([loss_type], both, both_refs, label_smoothing=0.1)
        alone = loss([loss_type], (chosen, rejected, *initial), (ref_chosen, ref_rejected), label_smoothing=0.1)
        gradients = torch.autograd.grad(with_it - alone, sides, allow_unused=True)
        differences += [gradient.abs().item() for gradient in gradients if gradient is not None]
    assert keeps_identical_pairs(None, [loss_type]) == (max(differences) > 1e-4)


@pytest.mark.parametrize(
    ("setting", "loss_types", "kept"),
    [
        (None, ["sigmoid", "sft"], True),
        (None, ["sigmoid", "ipo"], False),
        ("drop", ["sft"], False),
        ("keep", ["sigmoid"], True),
    ],
)
def test_one_loss_that_uses_identical_pairs_keeps_them_unless_the_user_decides(setting, loss_types, kept):
    assert keeps_identical_pairs(setting, loss_types) is kept
