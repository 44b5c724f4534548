"""Disks that are really full, really read-only, or not there: what a run says, what it leaves, and how it goes on."""

import os
import re
import subprocess
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import trained
from datasets import Dataset
from peft import LoraConfig
from stopping import AtStep

from spin_trl import SPINTrainer
from spin_trl.generation.vllm.managed_server import ManagedServer
from spin_trl.generation.vllm.serve_command import serve_command
from spin_trl.run_directory.disk import DiskError, writing
from spin_trl.run_directory.whole_files import is_temporary, write_whole


class Disk:
    """A file system of its own, in memory."""

    def __init__(self, path: Path, size: str):
        self.path = path
        self._mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path))

    def fill(self, room: int = 0) -> None:
        """Leave `room` bytes free."""
        with open(self.path / "filler", "wb", buffering=0) as filler:
            status = os.statvfs(self.path)
            filler.write(bytes(max(0, status.f_bavail * status.f_frsize - room)))

    def free(self) -> None:
        (self.path / "filler").unlink()

    def make_read_only(self) -> None:
        self._mount("-o", "remount,ro", str(self.path))

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)

    def _mount(self, *arguments: str) -> None:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.strip()}")


@pytest.fixture
def make_disk(tmp_path):
    """A factory of disks of a given size; they are unmounted at the end."""
    disks = []

    def make(size: str) -> Disk:
        (tmp_path / f"disk-{len(disks)}").mkdir()
        disks.append(Disk(tmp_path / f"disk-{len(disks)}", size))
        return disks[-1]

    yield make
    for disk in disks:
        disk.close()


def left_over(directory: Path) -> list[Path]:
    """What an unfinished write has left."""
    return [path for path in directory.rglob("*") if is_temporary(path)]


# Every phase of a run, with the disk filled just before


# phase: when the disk is filled, or what is there by then; bytes left free; what the error names.
PHASES = {
    "description": ("start", 0, "self_play.json"),
    "completions": ("self_play.json", 0, "iteration-0/evaluation/part-00000000-"),
    "metrics": ("evaluation", 0, "iteration-0/metrics.json"),
    "pairs": ("iteration-0/generations/part-*", 4096, "iteration-0/pairs"),
    "opponent": ("step 6", 100_000, "iteration-1/opponent"),
    "checkpoint": ("step 6", 450_000, "checkpoint-6"),
    "checkpoint, all but the last": ("step 6", 1_155_072, "checkpoint-6"),
}


@pytest.mark.parametrize(("when", "room", "name"), PHASES.values(), ids=PHASES)
def test_full_disk_is_named_leaves_nothing_half_written_and_the_same_command_goes_on(
    build_trainer, eval_dataset, make_disk, at_forward, when, room, name
):
    """One iteration of six steps; to fill the disk before an opponent is saved, two."""
    disk = make_disk("8m")
    run, fill = disk.path / "run", partial(disk.fill, room)
    settings = {"num_iterations": 1, "save_strategy": "epoch", "resume": "auto"}
    if "opponent" in name:
        settings |= {"num_iterations": 2, "num_opponents": 2, "save_strategy": "no"}
    fills = [fill] if when == "evaluation" else []

    def measure(prompts, truths, answers) -> dict[str, float]:
        while fills:
            fills.pop()()
        return {}

    def build(*callbacks) -> SPINTrainer:
        data = {"eval_dataset": eval_dataset, "compute_generation_metrics": measure}
        return build_trainer(output_dir=str(run), callbacks=list(callbacks), **data, **settings)

    trainer = build(AtStep(6 if when == "step 6" else -1, fill))
    if when == "start":
        fill()
    else:
        at_forward(fill, lambda: any(run.glob(when)))
    with pytest.raises(DiskError) as caught:
        trainer.train()
    message = str(caught.value)
    assert "No space left on device" in message and f"{run}/{name}" in message
    assert re.search(r"[\d.]+\w+ are free there\..*start the same command again", message)
    assert left_over(disk.path) == [] and trainer.store.checkpoints() == []
    assert "metrics" in name or "checkpoint" in name or not (run / name).exists()

    disk.free()
    again = trained(build())
    assert again.run.start.is_resumed == (when != "start")
    assert again.store.read_run()["finished"] and left_over(disk.path) == []
    assert len(again.store.checkpoints()) == (settings["save_strategy"] == "epoch")


# Each writer, alone


WRITERS = {
    "text": lambda path: path.write_text("a" * 200_000),
    "safetensors": lambda path: safetensors.torch.save_file({"a": torch.zeros(50_000)}, path),
    "torch": lambda path: torch.save(torch.zeros(50_000), path),
    "a directory": lambda path: Dataset.from_dict({"a": list(range(25_000))}).save_to_disk(path),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_whoever_writes_gives_the_same_error_and_leaves_nothing(make_disk, write):
    disk = make_disk("1m")
    for room in (0, 65_536):
        disk.fill(room)
        with pytest.raises(DiskError, match=r"No space left.*/new could not be written\. .*B are free"):
            write_whole(disk.path / "new", write)
        assert [path.name for path in disk.path.iterdir()] == ["filler"]
        disk.free()
    write_whole(disk.path / "new", write)
    disk.fill()
    with pytest.raises(DiskError):  # what was complete stays
        write_whole(disk.path / "new", write)
    disk.free()
    assert [path.name for path in disk.path.iterdir()] == ["new"]
    (disk.path / "file").write_text("")
    with pytest.raises(DiskError, match=r"Not a directory: .*/file/new could not be written"):
        write_whole(disk.path / "file" / "new", write)
    disk.make_read_only()
    with pytest.raises(DiskError, match=r"Read-only file system: .*/other could not be written.*Make it writable"):
        write_whole(disk.path / "other", write)
    with pytest.raises(DiskError, match="Read-only file system"), writing(disk.path / "other"):
        write(disk.path / "other")  # as Trainer does: there it is the library itself that fails
    assert sorted(path.name for path in disk.path.iterdir()) == ["file", "new"]


def test_log_of_a_managed_server_on_a_full_disk_is_an_error_before_the_server_starts(make_disk, tiny_model):
    disk = make_disk("1m")
    disk.fill()
    server = ManagedServer(disk.path / "vllm-server.log", 1, lambda uds: serve_command(tiny_model, ["--uds", uds]))
    with pytest.raises(DiskError, match=r"vllm-server\.log could not be written"):
        server.start()
    assert [path.name for path in disk.path.iterdir()] == ["filler"]


def test_read_only_run_directory_is_refused_before_a_model_is_loaded(make_disk, build_trainer):
    disk = make_disk("1m")
    disk.make_read_only()
    with pytest.raises(PermissionError, match=r"`output_dir` is .*read-only file system.*Choose a path"):
        build_trainer(model="org/model", output_dir=str(disk.path / "run"))


def test_error_of_another_kind_stays_as_it_is(tmp_path):
    for error in (ValueError("a"), FileNotFoundError(2, "b"), RuntimeError("CUDA out of memory"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, writing(tmp_path / "a"):
            raise error
        assert caught.value is error


# What a run will write


UNITS = {"B": 1, "kB": 1e3, "MB": 1e6}
RUNS = {
    "all weights": {},
    "without optimizer": {"save_only_model": True},
    "adapter": {"peft_config": LoraConfig(r=8, target_modules="all-linear")},
    "opponents": {"save_strategy": "no", "num_opponents": 2},
}


def size_on_disk(*directories: Path) -> int:
    return sum(path.stat().st_size for directory in directories for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_weights_that_a_run_will_write_are_told_before(build_trainer, capsys, settings):
    trainer = build_trainer(**{"save_strategy": "epoch", "num_iterations": 2, **settings})
    told = re.search(r"writes about .*opponents ([\d.]+)(\w+), checkpoints ([\d.]+)(\w+)", capsys.readouterr().out)
    opponents, checkpoints = float(told[1]) * UNITS[told[2]], float(told[3]) * UNITS[told[4]]
    trainer.train()
    assert size_on_disk(*trainer.store.checkpoints()) / 2 <= checkpoints <= size_on_disk(*trainer.store.checkpoints())
    saved = size_on_disk(*(trainer.store.path(i, "opponent") for i in range(2)))
    assert saved / 2 <= opponents <= saved


def test_run_that_cannot_fit_is_refused_and_one_that_may_not_fit_is_warned_of(build_trainer, make_disk, caplog):
    """Two checkpoints of 0.36 MB of weights and twice as much of moments. What lies there already counts as written."""

    def build(path: Path) -> SPINTrainer:
        return build_trainer(output_dir=str(path), save_strategy="epoch", resume="auto", num_iterations=2)

    with pytest.raises(DiskError, match=r"writes about .* are free.*needs 730kB\. Free.*`save_total_limit`"):
        build(make_disk("600k").path / "run")
    build(make_disk("2300k").path / "run")
    assert "That may not be enough" in caplog.text and "`save_total_limit`" in caplog.text
    disk = make_disk("3m")
    build(disk.path / "run").train()
    disk.fill(room=100_000)
    again = trained(build(disk.path / "run"))
    assert again.run.start.is_finished
