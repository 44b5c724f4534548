"""Pairs that lie in two places, read as if they lay in one."""

import pytest
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from spin_trl import load_pairs
from spin_trl.data.pair_dataset import PairDataset
from spin_trl.run_directory.store import RunDirectoryError


DATA = Dataset.from_dict(
    {"row": [7, 3, 5], "prompt_ids": [[1], [2, 2], [3, 3, 3]], "chosen_ids": [[4, 4, 4], [5], [6, 6]]}
)
ANSWERS = Dataset.from_dict({"row": [5, 7, 7, 3], "rejected_ids": [[8], [9, 9], [8, 8, 8, 8], []]})


def row(pair: dict) -> tuple:
    return pair["row"], pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"]


def test_every_way_of_reading_gives_the_same_rows():
    pairs = PairDataset.join(DATA, ANSWERS)
    rows = [(5, [3, 3, 3], [6, 6], [8]), (7, [1], [4, 4, 4], [9, 9])]
    rows += [(7, [1], [4, 4, 4], [8, 8, 8, 8]), (3, [2, 2], [5], [])]
    assert [row(pair) for pair in pairs] == rows
    assert [row(pairs[i]) for i in range(len(pairs))] == rows
    assert [row(pair) for pair in pairs.__getitems__([0, 1, 2, 3])] == rows
    assert list(zip(*row(pairs[:]), strict=True)) == rows
    assert (pairs["row"][:], pairs["chosen_ids"][:]) == ([5, 7, 7, 3], [ids for _, _, ids, _ in rows])
    tables = [table.to_pylist() for table in pairs.batches()]
    assert [row(pair) for table in tables for pair in table] == rows
    assert [row(pair) for pair in pairs.select([3, 2, 0]).select([2, 0])] == [rows[0], rows[3]]
    loaded = list(DataLoader(pairs, batch_size=3, shuffle=True, collate_fn=list))
    assert [len(batch) for batch in loaded] == [3, 1] and sorted(map(row, sum(loaded, []))) == sorted(rows)


# A run's


def test_pairs_are_loaded_from_a_runs_directory_whose_torn_data_are_written_again(play_run):
    settings = {"save_strategy": "epoch", "resume": "auto"}
    trainer = play_run(16, num_iterations=2, **settings)
    loaded = load_pairs(trainer.args.output_dir, 1)
    assert isinstance(loaded, Dataset) and len(loaded) == 32
    before = loaded.to_list()
    assert before == list(trainer.store.read_pairs(1))
    assert {*loaded.column_names} == {
        *("iteration", "row", "source_row", "sample", "prompt_ids", "chosen_ids", "rejected_ids"),
        *("ref_chosen_logps", "ref_rejected_logps"),
    }
    with pytest.raises(RunDirectoryError, match=r"no whole pairs of iteration 2 in .*Iterations with such: \[0, 1\]"):
        load_pairs(trainer.args.output_dir, 2)
    (trainer.store.output_dir / "train_data" / "rows.arrow").write_bytes(b"torn")
    with pytest.raises(RunDirectoryError, match="`train_data` in .* missing or damaged. Resume the run"):
        load_pairs(trainer.args.output_dir, 1)
    assert play_run(16, num_iterations=3, **settings).run.start.is_resumed
    assert load_pairs(trainer.args.output_dir, 1).to_list() == before


class CountMappedFiles(TrainerCallback):
    """Of the run directory, at every step."""

    def __init__(self):
        self.counts = []

    def on_step_begin(self, args, state, control, **kwargs):
        with open("/proc/self/maps") as maps:
            self.counts.append(sum(args.output_dir in line for line in maps))


def test_files_of_older_iterations_do_not_stay_mapped(play_run):
    """While an iteration is trained, its own pairs, those of the one before, and the data: 1 step, then 2 each."""
    count = CountMappedFiles()
    play_run(8, num_iterations=5, num_history_iterations=1, callbacks=[count])
    assert len(count.counts) == 1 + 4 * 2
    assert count.counts[3] == count.counts[5] == count.counts[7] <= 4
