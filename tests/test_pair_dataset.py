"""Pairs that lie in two places, read as if they lay in one."""

import pytest
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from spin_trl import SPINTrainer, load_pairs
from spin_trl.data.pair_dataset import PairDataset
from spin_trl.run_directory.store import RunDirectoryError


DATA = Dataset.from_dict(
    {"row": [7, 3, 5], "prompt_ids": [[1], [2, 2], [3, 3, 3]], "chosen_ids": [[4, 4, 4], [5], [6, 6]]}
)
ANSWERS = Dataset.from_dict({"row": [5, 7, 7, 3], "rejected_ids": [[8], [9, 9], [8, 8, 8, 8], []]})


@pytest.fixture
def pairs() -> PairDataset:
    return PairDataset.join(DATA, ANSWERS)


def row(pair: dict) -> tuple:
    return pair["row"], pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"]


ROWS = [
    (5, [3, 3, 3], [6, 6], [8]),
    (7, [1], [4, 4, 4], [9, 9]),
    (7, [1], [4, 4, 4], [8, 8, 8, 8]),
    (3, [2, 2], [5], []),
]


def test_every_way_of_reading_gives_the_same_rows(pairs):
    assert [row(pair) for pair in pairs] == ROWS
    assert [row(pairs[i]) for i in range(len(pairs))] == ROWS
    assert [row(pair) for pair in pairs.__getitems__([0, 1, 2, 3])] == ROWS
    assert list(zip(*row(pairs[:]), strict=True)) == ROWS
    assert (pairs["row"][:], pairs["chosen_ids"][:]) == ([5, 7, 7, 3], [ids for _, _, ids, _ in ROWS])
    tables = [table.to_pylist() for table in pairs.batches()]
    assert [row(pair) for table in tables for pair in table] == ROWS


def test_selection_of_a_selection_is_joined_as_the_whole(pairs):
    assert [row(pair) for pair in pairs.select([3, 2, 0]).select([2, 0])] == [ROWS[0], ROWS[3]]


def test_data_loader_shuffles_and_batches_them(pairs):
    batches = list(DataLoader(pairs, batch_size=3, shuffle=True, collate_fn=list))
    assert [len(batch) for batch in batches] == [3, 1]
    assert sorted(map(row, sum(batches, []))) == sorted(ROWS)


# A run's


def test_pairs_of_a_run_are_loaded_with_all_columns_from_its_directory_alone(tiny_model, train_dataset, make_config):
    trainer = SPINTrainer(tiny_model, make_config(num_iterations=2), train_dataset=train_dataset)
    trainer.train()
    loaded = load_pairs(trainer.args.output_dir, 1)
    assert isinstance(loaded, Dataset) and len(loaded) == 96
    assert loaded.to_list() == list(trainer.store.read_pairs(1))
    assert {*loaded.column_names} == {
        *("iteration", "row", "source_row", "sample", "prompt_ids", "chosen_ids", "rejected_ids"),
        *("ref_chosen_logps", "ref_rejected_logps"),
    }
    with pytest.raises(RunDirectoryError, match=r"no whole pairs of iteration 2 in .*Iterations with such: \[0, 1\]"):
        load_pairs(trainer.args.output_dir, 2)
    (trainer.store.output_dir / "train_data" / "rows.arrow").write_bytes(b"torn")
    with pytest.raises(RunDirectoryError, match="`train_data` in .* missing or damaged. Resume the run"):
        load_pairs(trainer.args.output_dir, 1)


def test_torn_data_are_written_again_when_a_run_is_resumed(tiny_model, train_dataset, make_config):
    settings = {"save_strategy": "epoch", "resume": "auto"}
    first = SPINTrainer(tiny_model, make_config(**settings, num_iterations=1), train_dataset=train_dataset)
    first.train()
    before = load_pairs(first.args.output_dir, 0).to_list()
    (first.store.output_dir / "train_data" / "rows.arrow").write_bytes(b"torn")
    again = SPINTrainer(tiny_model, make_config(**settings, num_iterations=2), train_dataset=train_dataset)
    again.train()
    assert again.run.start.is_resumed and again.store.has_whole_data()
    assert load_pairs(first.args.output_dir, 0).to_list() == before
    assert len(again.store.read_pairs(1)) == 96


class CountMappedFiles(TrainerCallback):
    """Of the run directory, at every step."""

    def __init__(self):
        self.counts = []

    def on_step_begin(self, args, state, control, **kwargs):
        with open("/proc/self/maps") as maps:
            self.counts.append(sum(args.output_dir in line for line in maps))


def test_files_of_older_iterations_do_not_stay_mapped(tiny_model, train_dataset, make_config):
    """While an iteration is trained, its own pairs, those of the one before, and the data: 6 steps, then 12 each."""
    config = make_config(num_iterations=5, num_history_iterations=1)
    count = CountMappedFiles()
    SPINTrainer(tiny_model, config, train_dataset=train_dataset, callbacks=[count]).train()
    assert len(count.counts) == 6 + 4 * 12
    assert count.counts[18] == count.counts[30] == count.counts[42] <= 4
