"""How completions become pairs, which pairs of older iterations join them, and what is told about them."""

import pyarrow as pa
import pytest
import torch
from conftest import read_rows
from datasets import Dataset
from trl.trainer.dpo_trainer import DataCollatorForPreference

from spin_trl import SPINConfig, SPINTrainer
from spin_trl.data.pair_dataset import TRUTH_COLUMNS, PairDataset
from spin_trl.data.pair_metrics import describe_pairs
from spin_trl.data.pairs import (
    ANSWER_SCHEMA,
    NoPairsError,
    add_history,
    drop_identical_pairs,
    find_identical_pairs,
    make_answers,
)
from spin_trl.objectives.settings import keeps_identical_pairs
from spin_trl.run_directory.completion_parts import COMPLETION_SCHEMA


DPO_LOSSES = [
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
]


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
    columns = {
        "row": [row for row, _ in keys],
        "sample": [sample for _, sample in keys],
        "completion_ids": [[30, row, sample] for row, sample in keys],
        "finish_reason": ["stop"] * len(keys),
    }
    return pa.table(columns, schema=COMPLETION_SCHEMA)


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
    """Their scores are left behind."""
    first = make_pairs(truths(0, 1), completions((0, 0), (1, 0)), iteration=0)
    first = PairDataset(first.truths, first.answers.add_column("ref_chosen_logps", [-1.0, -2.0]))
    second = add_history(make_pairs(truths(0, 1), completions((0, 0), (1, 0)), iteration=1), [(0, first)])
    new = make_pairs(truths(0, 1), completions((0, 0), (1, 0)), iteration=2)
    assert second["iteration"][:] == [1, 1, 0, 0]
    assert add_history(new, [(1, second)])["iteration"][:] == [2, 2, 1, 1]
    joined = add_history(new, [(0, first), (1, second)])
    assert joined["iteration"][:] == [2, 2, 0, 0, 1, 1]
    assert joined["row"][:] == [0, 1, 0, 1, 0, 1] and joined.column_names == new.column_names


def test_answers_of_no_words_make_pairs_that_dpos_collator_takes():
    """One opponent ended at once (its end token, 2), the other was cut off before it said anything."""
    columns = {"row": [0, 1], "sample": [0, 0], "completion_ids": [[2], []], "finish_reason": ["stop", "length"]}
    pairs = make_pairs(truths(0, 1), pa.table(columns, schema=COMPLETION_SCHEMA), iteration=0)
    assert pairs["rejected_ids"][:] == [[2], []]
    batch = DataCollatorForPreference(pad_token_id=9, max_length=8)(list(pairs))
    assert batch["input_ids"].tolist() == [[10, 0, 20, 0, 2], [10, 1, 20, 1, 2], [10, 0, 2, 9, 9], [10, 1, 9, 9, 9]]
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 1, 1]] * 2 + [[0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]


# Identical pairs


def pairs_of(*sides: tuple[list[int], list[int]]) -> PairDataset:
    chosen, rejected = zip(*sides, strict=True)
    truths = Dataset.from_dict({"prompt_ids": [[10, 10]] * len(sides), "chosen_ids": list(chosen)})
    return PairDataset(truths, Dataset.from_dict({"row": list(range(len(sides))), "rejected_ids": list(rejected)}))


def test_pairs_that_differ_in_one_token_or_their_order_stay():
    identical = [([1, 2], [1, 2]), ([2], [2]), ([], []), ([3, 3], [3, 3])]
    others = [([1, 2], [1]), ([1, 2], [1, 2, 2]), ([1], [2]), ([1, 2], [2, 1]), ([], [1]), ([1, 2, 3], [1, 2, 4])]
    pairs = pairs_of(*[*identical, *others] * 250)  # more than are read at a time
    is_identical = find_identical_pairs(pairs)
    assert is_identical.tolist() == ([True] * 4 + [False] * 6) * 250
    assert drop_identical_pairs(pairs, is_identical)["row"][:6] == [4, 5, 6, 7, 8, 9]


def test_iteration_of_identical_pairs_alone_is_stopped_with_what_it_means():
    pairs = pairs_of(([1, 2], [1, 2]), ([2], [2]))
    with pytest.raises(NoPairsError, match="in all 2 pairs.*converged.*`identical_pairs='keep'`"):
        drop_identical_pairs(pairs, find_identical_pairs(pairs))


@pytest.fixture(scope="module")
def trainer(tiny_model, tmp_path_factory):
    settings = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "use_vllm": False, "report_to": "none"}
    config = SPINConfig(output_dir=str(tmp_path_factory.mktemp("losses")), label_smoothing=0.1, **settings)
    return SPINTrainer(tiny_model, config, train_dataset=Dataset.from_list(read_rows("accent_train.jsonl", 4)))


def summed_gradient(trainer: SPINTrainer, loss_type: str, pairs: list[dict]) -> torch.Tensor:
    trainer.loss_types, trainer.loss_weights, trainer.label_smoothing = [loss_type], [1.0], 0.1
    trainer.model.zero_grad()
    (len(pairs) * trainer.compute_loss(trainer.model, trainer.data_collator(pairs))).backward()
    return torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_identical_pairs_are_dropped_if_and_only_if_a_batch_is_the_same_without_them(trainer, loss_type):
    """The summed gradient of two pairs, one of them identical, against that of the other alone."""
    identical = {"prompt_ids": [3, 4], "chosen_ids": [5, 6, 2], "rejected_ids": [5, 6, 2]}
    identical |= {"ref_chosen_logps": -5.0, "ref_rejected_logps": -5.0}
    other = {"prompt_ids": [7, 8], "chosen_ids": [9, 10, 2], "rejected_ids": [11, 2], "ref_rejected_logps": -5.0}
    differences = []
    for ref_chosen_logps in (-55.0, 45.0):
        with_it = summed_gradient(trainer, loss_type, [identical, {**other, "ref_chosen_logps": ref_chosen_logps}])
        alone = summed_gradient(trainer, loss_type, [{**other, "ref_chosen_logps": ref_chosen_logps}])
        differences.append((with_it - alone).abs().max().item())
    assert keeps_identical_pairs(None, [loss_type]) == (max(differences) > 1e-4)


@pytest.mark.parametrize(
    ("setting", "loss_types", "kept"),
    [
        *((None, losses, True) for losses in (["sigmoid", "sft"], ["space"], ["iris"], ["t_spin"])),
        (None, ["sigmoid", "ipo"], False),
        ("drop", ["sft"], False),
        ("keep", ["sigmoid"], True),
    ],
)
def test_one_loss_that_uses_identical_pairs_keeps_them_unless_the_user_decides(setting, loss_types, kept):
    assert keeps_identical_pairs(setting, loss_types) is kept


# Description


def test_description_of_pairs_by_hand():
    """
    Lengths 2, 1, 3, 2 against 2, 3, 1, 4; the first pair is identical. With a
    prompt of 2, four tokens hold all chosen sides but the third, and all rejected ones but the second and fourth.
    """
    pairs = pairs_of(([1, 2], [1, 2]), ([2], [1, 1, 2]), ([1, 1, 2], [2]), ([3, 2], [3, 2, 2, 2]))
    assert describe_pairs(pairs, find_identical_pairs(pairs), max_length=4) == {
        "num_pairs": 4,
        "chosen_length": 2.0,
        "rejected_length": 2.5,
        "chosen_truncated_share": 0.25,
        "rejected_truncated_share": 0.5,
        "identical_share": 0.25,
    }
    unlimited = describe_pairs(pairs, find_identical_pairs(pairs))
    assert unlimited["chosen_truncated_share"] == unlimited["rejected_truncated_share"] == 0.0
