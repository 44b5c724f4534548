"""What a run directory holds after a write that succeeded, and after one that did not."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from spin_trl.run_directory.description import differences
from spin_trl.run_directory.store import IterationStore, RunDirectoryError
from spin_trl.run_directory.whole_files import temporary_path


@pytest.fixture
def store(tmp_path) -> IterationStore:
    return IterationStore(tmp_path / "run", run_id="a-run")


def completions(*rows: int, samples: tuple[int, ...] = (0,)) -> dict[str, list]:
    """Completions of the rows, told apart by their ids: row, then sample."""
    keys = [(row, sample) for row in rows for sample in samples]
    return {
        "row": [row for row, _ in keys],
        "sample": [sample for _, sample in keys],
        "completion_ids": [[row, sample] for row, sample in keys],
        "finish_reason": ["stop" for _ in keys],
    }


def files(store: IterationStore) -> list[str]:
    return sorted(str(path.relative_to(store.output_dir)) for path in store.output_dir.rglob("*") if path.is_file())


# Atomic writes


def test_interrupt_during_a_write_leaves_no_file_either(store, monkeypatch):
    def interrupt(path, *args):
        Path.touch(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.write_run({"model": "m"})
    assert files(store) == []


def run_data(*rows: int) -> Dataset:
    """Rows whose token ids tell them apart."""
    columns = {"row": list(rows), "source_row": list(rows), "prompt": [f"prompt {row}" for row in rows]}
    ids = {"prompt_ids": [[10, row] for row in rows], "chosen_ids": [[20, row, 2] for row in rows]}
    return Dataset.from_dict({**columns, **ids})


def answers(*rows: int) -> Dataset:
    return Dataset.from_dict({"row": list(rows), "rejected_ids": [[30, row] for row in rows]})


def test_pairs_that_could_not_be_written_are_absent_and_can_be_written_again(store):
    store.write_data(run_data(0, 1))
    with pytest.raises(pa.ArrowInvalid):
        store.write_pairs(0, answers(0, 1), {"ref_chosen_logps": np.zeros(1)})
    assert not store.has_pairs(0)
    store.write_pairs(0, answers(0, 1), {})
    assert store.read_pairs(0)["row"][:] == [0, 1]
    assert [path.name for path in store.path(0).iterdir()] == ["pairs"]


def test_opponent_that_could_not_be_saved_leaves_the_earlier_one(store):
    def save(content, fail=False):
        def write(directory):
            Path(directory).mkdir(parents=True)
            (Path(directory) / "model.safetensors").write_text(content)
            if fail:
                raise OSError("No space left on device")

        return write

    store.write_opponent(1, save("old"), is_main_process=True)
    with pytest.raises(OSError, match="No space left"):
        store.write_opponent(1, save("half", fail=True), is_main_process=True)
    assert (store.path(1, "opponent") / "model.safetensors").read_text() == "old"
    store.write_opponent(1, save("new"), is_main_process=True)
    assert files(store) == ["iteration-1/opponent/model.safetensors"]
    assert (store.path(1, "opponent") / "model.safetensors").read_text() == "new"


# Damage


def parts(store: IterationStore) -> list[Path]:
    return sorted(store.path(0, "generations").iterdir())


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def give_another_name(path: Path) -> None:
    path.rename(path.with_name("part-00000001.parquet"))


def bring_from_another_run(path: Path) -> None:
    other = IterationStore(path.parents[3] / "other", run_id="another")
    other.write_completions(0, "generations", 0, completions(0, 1))
    foreign = next(other.path(0, "generations").iterdir())
    path.unlink()
    foreign.rename(path.with_name(foreign.name))


DAMAGES = [
    (cut_off, "is torn: .* bytes, not the"),
    (flip_a_bit, "does not have the checksum of its name"),
    (give_another_name, "is not a part of a run"),
    (bring_from_another_run, "is of another origin: .*'another'"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_part_is_not_read_and_its_rows_are_missing_again(store, damage, message):
    store.write_completions(0, "generations", 0, completions(0, 1))
    store.write_completions(0, "generations", 2, completions(2, 3))
    damage(parts(store)[0])
    with pytest.raises(RunDirectoryError, match=message):
        store.read_completions(0, "generations")
    assert set(store.completed_rows(0, "generations")) == {2, 3}
    assert len(parts(store)) == 1


def test_part_of_another_iteration_is_known_by_its_content(store):
    store.write_completions(1, "generations", 0, completions(0, 1))
    store.path(0).mkdir()
    store.path(1, "generations").rename(store.path(0, "generations"))
    assert set(store.completed_rows(0, "generations")) == set()


@pytest.mark.parametrize("damage", [cut_off, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("file", ["rows.arrow", "checksum.txt"])
def test_damaged_pairs_and_data_are_known_as_such(store, damage, file):
    assert not store.has_whole_data() and store.pairs_checksum(0) is None
    store.write_data(run_data(0, 1))
    store.write_pairs(0, answers(0, 1), {})
    assert store.has_whole_data() and store.has_whole_pairs(0) and len(store.pairs_checksum(0)) == 16
    damage(store.output_dir / "train_data" / file)
    damage(store.path(0, "pairs") / file)
    assert not store.has_whole_data() and not store.has_whole_pairs(0)


def test_data_of_another_run_are_not_this_ones(store):
    store.write_data(run_data(0, 1))
    assert not IterationStore(store.output_dir, run_id="another").has_whole_data()


def test_pairs_of_rows_that_the_data_lack_are_refused(store):
    store.write_data(run_data(0, 1))
    store.write_pairs(0, answers(1, 2), {})
    with pytest.raises(RunDirectoryError, match="have no row 2.*not of the same run.*overwrite_output_dir"):
        store.read_pairs(0)


def test_folder_of_somebody_else_where_the_data_would_go_is_refused_and_kept(store):
    (store.output_dir / "train_data").mkdir(parents=True)
    (store.output_dir / "train_data" / "mine.jsonl").write_text("{}")
    with pytest.raises(RunDirectoryError, match="train_data is where a run keeps.*Move it away"):
        store.write_data(run_data(0))
    store.clear()
    assert files(store) == ["train_data/mine.jsonl"]


def test_what_was_not_written_to_its_end_is_cleared_and_nothing_else(store):
    store.write_completions(0, "generations", 0, completions(0, 1))
    store.write_run({"model": "m"})
    before = files(store)
    for path in (store.output_dir / "self_play.json", parts(store)[0], store.path(0, "pairs", "data")):
        temporary = temporary_path(path.parent if path.name == "data" else path)
        temporary.mkdir() if path.name == "data" else temporary.write_text("half")
    store.clear_temporary()
    assert files(store) == before
    assert sorted(path.name for path in store.path(0).iterdir()) == ["generations"]


def test_description_that_is_no_json_is_an_error_that_names_it(store):
    store.output_dir.mkdir()
    (store.output_dir / "self_play.json").write_text('{"model": ')
    with pytest.raises(RunDirectoryError, match="self_play.json is not JSON.*overwrite_output_dir=True"):
        store.read_run()


# One process at a time


HOLDER = """
import sys
from spin_trl.run_directory.store import IterationStore

with IterationStore(sys.argv[1]).lock():
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_directory_that_another_process_runs_in_is_refused_until_that_is_killed(store):
    command = [sys.executable, "-c", HOLDER, str(store.output_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(RunDirectoryError, match="Another process is running in `output_dir`"), store.lock():
            pass
        holder.kill()
    with store.lock():
        pass


# Round trips


def test_completions_of_all_parts_come_back_sorted_by_row_and_sample(store):
    store.write_completions(0, "generations", 7, completions(9, 7, samples=(1, 0)))
    store.write_completions(0, "generations", 0, completions(0, 8, samples=(0, 1)))
    table = store.read_completions(0, "generations")
    assert table["completion_ids"].to_pylist() == [[r, s] for r in (0, 7, 8, 9) for s in (0, 1)]
    assert table.select(["row", "sample"]).to_pylist() == [
        {"row": r, "sample": s} for r in (0, 7, 8, 9) for s in (0, 1)
    ]
    assert set(table["finish_reason"].to_pylist()) == {"stop"}


def test_completed_rows_are_those_of_whole_parts_of_this_kind_and_iteration(store):
    assert set(store.completed_rows(0, "generations")) == set()
    store.write_completions(0, "generations", 0, completions(0, 5))
    store.write_completions(0, "evaluation", 0, completions(1))
    store.write_completions(1, "generations", 0, completions(2))
    leftover = store.path(0, "generations", "part-00000009-4-0123456789abcdef.parquet.tmp-1234")
    leftover.write_bytes(b"half")
    assert set(store.completed_rows(0, "generations")) == {0, 5}


def test_completions_that_were_never_made_are_an_empty_table(store):
    table = store.read_completions(3, "evaluation")
    assert len(table) == 0
    assert table.column_names == ["row", "sample", "completion_ids", "finish_reason"]


def test_pairs_come_back_with_the_columns_of_the_data_and_scores(store):
    store.write_data(run_data(2, 3, 4))
    store.write_pairs(2, answers(4, 2), {"ref_rejected_logps": np.array([-1.5, -0.25], np.float32)})
    assert store.read_pairs(2)[:] == {
        "row": [4, 2],
        "rejected_ids": [[30, 4], [30, 2]],
        "ref_rejected_logps": [-1.5, -0.25],
        "prompt_ids": [[10, 4], [10, 2]],
        "chosen_ids": [[20, 4, 2], [20, 2, 2]],
    }


def test_pairs_on_disk_hold_no_prompt_and_no_ground_truth(store):
    store.write_data(run_data(0, 1))
    store.write_pairs(0, answers(0, 1), {"ref_chosen_logps": np.array([-1.0, -2.0])})
    (file,) = store.path(0, "pairs").glob("*.arrow")
    assert Dataset.from_file(str(file)).column_names == ["row", "rejected_ids", "ref_chosen_logps"]


def test_completions_of_parts_that_interleave_are_read_in_order_a_few_at_a_time(store):
    """A run that was stopped twice, with parts of other sizes: 0 to 3, then 8 to 11, then what was missing."""
    store.write_completions(0, "generations", 8, completions(*range(8, 12)))
    store.write_completions(0, "generations", 0, completions(*range(4)))
    store.write_completions(0, "generations", 4, completions(4, 5, 6, 7, 12, 13))
    tables = list(store.completions(0, "generations").batches(batch_size=5))
    assert [len(table) for table in tables] == [5, 5, 4]
    assert [ids for table in tables for ids in table["completion_ids"].to_pylist()] == [[row, 0] for row in range(14)]


def test_share_of_cut_off_completions_is_over_all_parts(store):
    assert store.completions(0, "generations").cut_off_share() == 0.0
    store.write_completions(0, "generations", 0, {**completions(0, 1), "finish_reason": ["stop", "length"]})
    store.write_completions(0, "generations", 2, completions(2, 3))
    assert store.completions(0, "generations").cut_off_share() == 0.25


def test_metrics_of_later_phases_join_those_of_earlier_ones(store):
    store.write_metrics(0, {"nll": 2.0, "seconds_publish": 1.0})
    store.write_metrics(0, {"nll": 1.0, "evaluation": {"accuracy": 0.5}})
    store.write_metrics(2, {"nll": 0.5})
    assert store.read_metrics(0) == {"nll": 1.0, "seconds_publish": 1.0, "evaluation": {"accuracy": 0.5}}
    assert store.read_metrics(1) == {}
    assert list(store.all_metrics()) == [(0, store.read_metrics(0)), (2, {"nll": 0.5})]


def test_metric_that_is_not_a_number_survives(store):
    store.write_metrics(0, {"nll": math.nan})
    assert math.isnan(store.read_metrics(0)["nll"])


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


def test_opponent_replaces_an_older_folder_and_holds_no_pickled_arguments(store):
    old = store.path(1, "opponent")
    old.mkdir(parents=True)
    (old / "adapter_model.bin").write_text("old")
    stale = temporary_path(old, shared=True)
    stale.mkdir()
    (stale / "half").write_text("of an interrupted run")

    def save(directory):
        Path(directory).mkdir(parents=True)
        (Path(directory) / "adapter_model.safetensors").write_text("new")
        (Path(directory) / "training_args.bin").write_text("pickle")

    assert store.write_opponent(1, save, is_main_process=True) == old
    assert files(store) == ["iteration-1/opponent/adapter_model.safetensors"]


def test_other_processes_take_part_in_saving_the_opponent_but_touch_no_file(store):
    asked = []
    path = store.write_opponent(1, asked.append, is_main_process=False)
    assert path == store.path(1, "opponent")
    assert len(asked) == 1 and Path(asked[0]).parent == path.parent and asked[0] != str(path)
    assert not store.output_dir.exists()


def test_nothing_is_written_before_the_first_write(store):
    assert store.iterations() == []
    assert store.read_metrics(0) == {}
    assert not store.has_pairs(0)
    assert not store.output_dir.exists()


# What is there


def test_iterations_are_numbers_in_order_and_foreign_names_are_ignored(store):
    names = ["iteration-10", "iteration-2", "iteration-", "iteration-x", "iteration-1.tmp", "my-iteration-5", "other"]
    for name in names:
        (store.output_dir / name).mkdir(parents=True)
    assert store.iterations() == [2, 10]


def test_invalid_rows_are_listed_one_a_line_and_gone_when_the_next_run_has_none(store):
    rows = [{"dataset": "train_dataset", "row": 3, "reason": "`prompt` is empty."}, {"row": 5, "reason": "\ud800"}]
    store.write_invalid_rows(rows)
    assert [json.loads(line) for line in (store.output_dir / "invalid_rows.jsonl").read_text().splitlines()] == rows
    store.write_invalid_rows([])
    assert files(store) == []


def test_clearing_a_run_leaves_what_is_not_its_own(store):
    store.write_run({"model": "m"})
    store.write_metrics(0, {"nll": 1.0})
    store.write_metrics(12, {"nll": 1.0})
    store.write_invalid_rows([{"row": 3}])
    store.write_data(run_data(0))
    (store.output_dir / "checkpoint-40").mkdir()
    (store.output_dir / "checkpoint-40" / "model.safetensors").write_text("weights")
    foreign = ["notes.txt", "iteration-notes.txt", "checkpoint-best/model.safetensors", "iteration-plots/nll.png"]
    for name in foreign:
        path = store.output_dir / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("not of this run")
    store.clear()
    assert files(store) == sorted(foreign)
    assert store.iterations() == []
