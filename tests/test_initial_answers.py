"""The initial policy's answers: kept with the run, joined with later iterations' pairs, made again if they can be."""

import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset
from small_run import cut_off, write_part

from spin_trl import load_pairs
from spin_trl.data.pairs import ANSWER_SCHEMA
from spin_trl.run_directory.store import IterationStore, RunDirectoryError


RUN = "0a1b2c3d"
KEYS = [(row, sample) for row in range(3) for sample in range(2)]


def answer(iteration: int, row: int, sample: int) -> list[int]:
    """Tells whose answer it is; they differ in length."""
    return [iteration, row, sample] + [2] * row


def write_generations(store: IterationStore, keys: list[tuple[int, int]]) -> None:
    write_part(store, 0, {key: answer(0, *key) for key in keys})


def write_pairs(store: IterationStore, iteration: int, keys: list[tuple[int, int, int]]) -> None:
    """Each key is an iteration, whose opponent answered, a row and a sample."""
    rows = [
        {"iteration": i, "row": row, "source_row": row, "sample": sample, "rejected_ids": answer(i, row, sample)}
        for i, row, sample in keys
    ]
    store.write_pairs(iteration, Dataset(pa.Table.from_pylist(rows, schema=ANSWER_SCHEMA)), {})


@pytest.fixture
def store(tmp_path) -> IterationStore:
    """Iteration 0 is played: three prompts with two answers each, in two parts, the later one written first."""
    store = IterationStore(tmp_path, RUN)
    store.write_run({"run": RUN})
    rows = [{"row": row, "source_row": row, "prompt": "", "prompt_ids": [9], "chosen_ids": [8]} for row in range(3)]
    store.write_data(Dataset.from_list(rows))
    write_generations(store, KEYS[4:])
    write_generations(store, KEYS[:4])
    store.initial_answers.keep()
    return store


def test_every_pair_of_a_later_iteration_has_the_initial_answer_of_its_row_and_sample(store):
    """Identical pairs were dropped, older ones joined, in some order of their own."""
    keys = [(2, 2, 1), (2, 0, 0), (2, 1, 1), (1, 2, 0), (1, 0, 1), (0, 1, 1)]
    write_pairs(store, 2, keys)
    for pairs in (store.read_pairs(2), load_pairs(store.output_dir, 2)):
        assert [pair["rejected_ids"] for pair in pairs] == [answer(*key) for key in keys]
        assert [pair["initial_ids"] for pair in pairs] == [answer(0, row, sample) for _, row, sample in keys]
    chosen = store.read_pairs(2).select([2, 0])
    assert chosen["initial_ids"][:] == [answer(0, 1, 1), answer(0, 2, 1)]
    assert [row["initial_ids"] for table in chosen.batches() for row in table.to_pylist()] == chosen["initial_ids"][:]


def test_iteration_0_has_none_and_neither_has_a_run_that_keeps_none(store):
    write_pairs(store, 0, [(0, 1, 1)])
    assert "initial_ids" not in store.read_pairs(0).column_names
    other = IterationStore(store.output_dir / "other", RUN)
    other.write_data(store.read_data())
    write_pairs(other, 1, [(1, 1, 1)])
    assert "initial_ids" not in other.read_pairs(1).column_names


def test_pair_that_the_initial_policy_gave_no_answer_for_is_refused(store):
    write_pairs(store, 1, [(1, 0, 0), (1, 2, 2)])
    with pytest.raises(RunDirectoryError, match="no answer .* for row 2, sample 2.*`overwrite_output_dir=True`"):
        store.read_pairs(1)


# A run that goes on


def rows_file(store: IterationStore):
    return store.initial_answers.rows.path / "rows.arrow"


def put_those_of_another_run(file: Path) -> None:
    """The same answers, as a run of another name would have written them."""
    other = IterationStore(file.parents[2] / "other", "another")
    write_generations(other, KEYS)
    other.initial_answers.keep()
    shutil.copytree(other.initial_answers.rows.path, file.parent, dirs_exist_ok=True)


@pytest.mark.parametrize("spoil", [Path.unlink, lambda file: file.write_bytes(b"torn"), put_those_of_another_run])
def test_others_are_made_again_from_what_the_first_opponent_generated(store, spoil):
    expected = rows_file(store).read_bytes()
    spoil(rows_file(store))
    store.initial_answers.restore(3)
    assert rows_file(store).read_bytes() == expected
    shutil.rmtree(store.path(0, "generations"))
    store.initial_answers.restore(3)  # they are whole, whatever has become of what they were made of


def test_they_are_lost_where_a_part_is_torn_too(store):
    rows_file(store).unlink()
    cut_off(sorted(store.path(0, "generations").iterdir())[1])
    with pytest.raises(
        RunDirectoryError,
        match="initial_answers is missing or damaged.*2 of the 3 prompts.*`overwrite_output_dir=True`",
    ):
        store.initial_answers.restore(3)
