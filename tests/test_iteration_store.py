"""What a run directory holds after a write that succeeded, and after one that did not."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import all_completions
from datasets import Dataset
from small_run import cut_off, flip_a_bit, write_part

from spin_trl.run_directory.description import differences
from spin_trl.run_directory.store import IterationStore, RunDirectoryError
from spin_trl.run_directory.whole_files import temporary_path, write_whole


@pytest.fixture
def store(tmp_path) -> IterationStore:
    return IterationStore(tmp_path / "run", run_id="a-run")


def write_completions(store: IterationStore, *rows: int, samples: tuple[int, ...] = (0,), iteration: int = 0) -> None:
    """A part with completions of the rows, told apart by their ids: row, then sample."""
    write_part(store, iteration, {(row, sample): [row, sample] for row in rows for sample in samples})


def completed_rows(store: IterationStore, iteration: int = 0, kind: str = "generations") -> list[int]:
    return store.completions(iteration, kind).completed_rows().tolist()


def run_data(*rows: int) -> Dataset:
    """Rows whose token ids tell them apart."""
    columns = {"row": list(rows), "source_row": list(rows), "prompt": [f"prompt {row}" for row in rows]}
    ids = {"prompt_ids": [[10, row] for row in rows], "chosen_ids": [[20, row, 2] for row in rows]}
    return Dataset.from_dict({**columns, **ids})


def answers(*rows: int) -> Dataset:
    return Dataset.from_dict({"row": list(rows), "rejected_ids": [[30, row] for row in rows]})


def files(store: IterationStore) -> list[str]:
    return sorted(str(path.relative_to(store.output_dir)) for path in store.output_dir.rglob("*") if path.is_file())


# Whole or not at all


def test_interrupt_during_a_write_leaves_what_was_there(tmp_path):
    def interrupt(path):
        path.write_text("half")
        raise KeyboardInterrupt

    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", interrupt)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def save(content: str, fail: bool = False):
    def write(directory):
        Path(directory).mkdir(parents=True)
        (Path(directory) / "model.safetensors").write_text(content)
        (Path(directory) / "training_args.bin").write_text("pickle")
        if fail:
            raise OSError("No space left on device")

    return write


def test_opponent_replaces_an_older_one_when_it_is_whole_and_holds_no_pickle(store):
    store.write_opponent(1, save("old"), is_main_process=True)
    with pytest.raises(OSError, match="No space left"):
        store.write_opponent(1, save("half", fail=True), is_main_process=True)
    assert (store.path(1, "opponent") / "model.safetensors").read_text() == "old"
    (store.path(1, "opponent") / "adapter_model.bin").write_text("of another kind")
    temporary_path(store.path(1, "opponent"), shared=True).mkdir()  # of a process that was killed
    assert store.write_opponent(1, save("new"), is_main_process=True) == store.path(1, "opponent")
    assert files(store) == ["iteration-1/opponent/model.safetensors"]
    assert (store.path(1, "opponent") / "model.safetensors").read_text() == "new"


def test_what_was_not_written_to_its_end_is_cleared_and_nothing_else(store):
    write_completions(store, 0, 1)
    store.write_run({"model": "m"})
    before = files(store)
    for path in (store.output_dir / "self_play.json", store.path(0, "generations", "part"), store.path(0, "pairs")):
        temporary_path(path).write_text("half")
    store.clear_temporary()
    assert files(store) == before


# Damage


def parts(store: IterationStore) -> list[Path]:
    return sorted(store.path(0, "generations").iterdir())


def give_another_name(path: Path) -> None:
    path.rename(path.with_name("part-00000001.parquet"))


def bring_from(run_id: str, iteration: int):
    def bring(path: Path) -> None:
        other = IterationStore(path.parents[3] / "other", run_id)
        write_completions(other, 0, 1, iteration=iteration)
        foreign = next(other.path(iteration, "generations").iterdir())
        path.unlink()
        foreign.rename(path.with_name(foreign.name))

    return bring


DAMAGES = [
    (cut_off, "does not have the checksum of its name"),
    (flip_a_bit, "does not have the checksum of its name"),
    (give_another_name, "is not a part of a run"),
    (bring_from("another", 0), "is of another origin: .*'another'"),
    (bring_from("a-run", 1), "is of another origin: .*'iteration': '1'"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_part_is_not_read_and_its_rows_are_missing_again(store, damage, message):
    write_completions(store, 0, 1)
    write_completions(store, 2, 3)
    damage(parts(store)[0])
    with pytest.raises(RunDirectoryError, match=message):
        all_completions(store, 0)
    assert completed_rows(store) == [2, 3]
    assert len(parts(store)) == 1


@pytest.mark.parametrize("damage", [cut_off, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("file", ["rows.arrow", "checksum.txt"])
def test_damaged_pairs_and_data_are_known_as_such(store, damage, file):
    assert not store.has_whole_data() and store.pairs(0).checksum() is None
    store.write_data(run_data(0, 1))
    store.write_pairs(0, answers(0, 1), {})
    assert store.has_whole_data() and store.pairs(0).is_whole() and len(store.pairs(0).checksum()) == 16
    damage(store.output_dir / "train_data" / file)
    damage(store.path(0, "pairs") / file)
    assert not store.has_whole_data() and not store.pairs(0).is_whole()


def test_data_of_another_run_or_without_the_preferences_are_not_this_ones(store):
    store.write_data(run_data(0, 1))
    assert store.has_whole_data() and not store.has_whole_data(has_preferences=True)
    assert not IterationStore(store.output_dir, run_id="another").has_whole_data()


def test_pairs_of_rows_that_the_data_lack_are_refused(store):
    store.write_data(run_data(0, 1))
    store.write_pairs(0, answers(1, 2), {})
    with pytest.raises(RunDirectoryError, match="have no row 2.*not of the same run.*overwrite_output_dir"):
        store.read_pairs(0)


def test_description_that_is_no_json_is_an_error_that_names_it(store):
    store.output_dir.mkdir()
    (store.output_dir / "self_play.json").write_text('{"model": ')
    with pytest.raises(RunDirectoryError, match="self_play.json is not JSON.*overwrite_output_dir=True"):
        store.read_run()


# Round trips


def test_completions_of_parts_that_interleave_are_read_in_order_a_few_at_a_time(store):
    """A run that was stopped twice, with parts of other sizes: 0 to 3, then 8 to 11, then what was missing."""
    write_completions(store, *range(8, 12), samples=(1, 0))
    write_completions(store, *range(4), samples=(0, 1))
    write_completions(store, 4, 5, 6, 7, 12, 13, samples=(0, 1))
    tables = list(store.completions(0, "generations").batches(batch_size=10))
    assert [len(table) for table in tables] == [10, 10, 8]
    ids = [ids for table in tables for ids in table["completion_ids"].to_pylist()]
    assert ids == [[row, sample] for row in range(14) for sample in (0, 1)]
    assert [[row["row"], row["sample"]] for table in tables for row in table.to_pylist()] == ids


def test_completed_rows_are_those_of_whole_parts_of_this_kind_and_iteration(store):
    assert completed_rows(store) == [] and list(store.completions(0, "generations").batches()) == []
    write_completions(store, 0, 5)
    write_completions(store, 2, iteration=1)
    store.path(0, "generations", "part-00000009-0123456789abcdef.parquet.tmp-1234").write_bytes(b"half")
    assert completed_rows(store) == [0, 5] and completed_rows(store, kind="evaluation") == []


def test_pairs_come_back_with_the_columns_of_the_data_and_scores_but_hold_only_their_own(store):
    store.write_data(run_data(2, 3, 4))
    store.write_pairs(2, answers(4, 2), {"ref_rejected_logps": np.array([-1.5, -0.25], np.float32)})
    assert store.read_pairs(2)[:] == {
        "row": [4, 2],
        "rejected_ids": [[30, 4], [30, 2]],
        "ref_rejected_logps": [-1.5, -0.25],
        "prompt_ids": [[10, 4], [10, 2]],
        "chosen_ids": [[20, 4, 2], [20, 2, 2]],
    }
    assert store.pairs(2).read().column_names == ["row", "rejected_ids", "ref_rejected_logps"]


def test_metrics_of_later_phases_join_those_of_earlier_ones(store):
    assert store.iterations() == [] and store.read_metrics(0) == {} and not store.output_dir.exists()
    store.write_metrics(0, {"nll": 2.0, "seconds_publish": math.nan})
    store.write_metrics(0, {"nll": 1.0, "evaluation": {"accuracy": 0.5}})
    store.write_metrics(2, {"nll": 0.5})
    assert math.isnan(store.read_metrics(0).pop("seconds_publish"))
    assert store.read_metrics(0)["nll"] == 1.0 and store.read_metrics(0)["evaluation"] == {"accuracy": 0.5}
    assert [iteration for iteration, _ in store.all_metrics()] == [0, 2]


def test_description_of_the_run_comes_back_without_secrets(store):
    secrets = {"hub_token": "a", "model_init_kwargs": {"token": "hf_b", "revision": "main"}, "note": "hf_" + "c" * 30}
    servers = {"vllm_server_base_url": ["http://me:d@host:8000/v1"], "vllm_server_args": "--hf-token e --dtype auto"}
    store.write_run({"model": "m", "config": {"num_iterations": 3, **secrets, **servers}})
    assert store.read_run() == {
        "model": "m",
        "config": {
            "num_iterations": 3,
            "hub_token": "<secret>",
            "model_init_kwargs": {"token": "<secret>", "revision": "main"},
            "note": "<secret>",
            "vllm_server_base_url": ["http://host:8000/v1"],
            "vllm_server_args": "--hf-token <secret> --dtype auto",
        },
    }


# What binds


@pytest.mark.parametrize(
    ("stored", "present", "names"),
    [
        ({"config": {"beta": 0.1}}, {"config": {"beta": 0.2}}, ["beta"]),
        ({"config": {}}, {"config": {"top_k": 0, "learning_rate": 5e-7}}, []),  # a release that lacked them
        ({"config": {}}, {"config": {"top_k": 5}}, ["top_k"]),
        ({"config": {"num_iterations": 2}}, {"config": {"num_iterations": 1}}, ["num_iterations"]),
        ({"config": {"num_iterations": 2}}, {"config": {"num_iterations": 3}}, []),
        ({"config": {"learning_rate": 0.1}}, {"config": {"learning_rate": [0.1, 0.2]}}, ["learning_rate"]),
        ({"config": {"beta": [0.1, 0.2]}}, {"config": {"beta": [0.1, 0.2, 0.3]}}, []),
        ({"config": {"logging_steps": 1}}, {"config": {"logging_steps": 7, "vllm_request_timeout": 1.0}}, []),
        ({"adapter": {"r": 4}}, {"adapter": {"r": 4, "new_in_peft": True, "peft_version": "9"}}, []),
        ({"adapter": {"r": 4}}, {"adapter": {"r": 8}}, ["adapter"]),
        ({"adapter": {"r": 4}}, {"adapter": None}, ["adapter"]),
        ({"data": {}}, {"data": {"preference_checksum": "a"}}, ["data.preference_checksum"]),
    ],
)
def test_settings_that_change_the_result_bind_and_others_do_not(stored, present, names):
    assert [text.split("`")[1] for text in differences(stored, present)] == names


# What is there


def test_invalid_rows_are_listed_one_a_line_and_gone_when_the_next_run_has_none(store):
    rows = [{"dataset": "train_dataset", "row": 3, "reason": "`prompt` is empty."}, {"row": 5, "reason": "\ud800"}]
    store.write_invalid_rows(rows)
    assert [json.loads(line) for line in (store.output_dir / "invalid_rows.jsonl").read_text().splitlines()] == rows
    store.write_invalid_rows([])
    assert files(store) == []


def test_clearing_a_run_leaves_what_is_not_its_own(store):
    store.write_run({"model": "m"})
    for iteration in (12, 2):
        store.write_metrics(iteration, {"nll": 1.0})
    store.write_invalid_rows([{"row": 3}])
    for name in ("log.jsonl", "report.html"):
        (store.output_dir / name).write_text("of this run")
    store.write_data(run_data(0))
    foreign = ["notes.txt", "iteration-notes.txt", "checkpoint-best/model.safetensors", "iteration-plots/nll.png"]
    foreign += ["preference_data/mine.jsonl", "iteration-01/a", "iteration--1/a", "iteration-²/a", "iteration-1.tmp/a"]
    for name in ("checkpoint-40/model.safetensors", *foreign):
        path = store.output_dir / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("not of this run")
    assert store.iterations() == [2, 12]
    with pytest.raises(RunDirectoryError, match="preference_data is where a run keeps.*Move it away"):
        store.write_data(run_data(0), preferences=run_data(1))
    store.clear()
    assert files(store) == sorted(foreign)
    assert store.iterations() == []
