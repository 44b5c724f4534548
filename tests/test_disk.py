"""Disks that are really full, really read-only, or not there: what a run says, what it leaves, and how it goes on."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import ROOT, read_rows
from datasets import Dataset
from peft import LoraConfig
from test_safety import changed_model

from spin_trl import SPINTrainer
from spin_trl.generation.vllm.managed_server import ManagedServer
from spin_trl.run_directory.disk import DiskError, readable, writing
from spin_trl.run_directory.store import IterationStore
from spin_trl.run_directory.whole_files import is_temporary, write_directory, write_file, write_text


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
    """What an unfinished write has left, of ours or of a library."""
    return [path for path in directory.rglob("*") if is_temporary(path) or path.name.startswith((".tmp", "tmp"))]


# Every phase of a run, with the disk filled just before


def before(trainer, owner: str, method: str, act) -> None:
    """Have `act()` called before the first call of a method of the trainer, or of its store."""
    target = trainer if owner == "trainer" else trainer.store
    original = getattr(target, method)

    def first(*args, **kwargs):
        setattr(target, method, original)
        act()
        return original(*args, **kwargs)

    setattr(target, method, first)


# phase: whose method is called first in it, bytes left free, what the error names.
PHASES = {
    "description": ("store", "write_run", 0, "self_play.json"),
    "opponent": ("store", "write_opponent", 0, "iteration-0/opponent"),
    "opponent, half": ("store", "write_opponent", 100_000, "iteration-0/opponent"),
    "completions": ("store", "write_completions", 0, "iteration-0/evaluation/part-00000000-"),
    "pairs": ("store", "write_pairs", 0, "iteration-0/pairs"),
    "pairs, half": ("store", "write_pairs", 4096, "iteration-0/pairs"),
    "metrics": ("store", "write_metrics", 0, "iteration-0/metrics.json"),
    "checkpoint": ("trainer", "_save_checkpoint", 0, "checkpoint-6"),
    "checkpoint, weights alone": ("trainer", "_save_checkpoint", 450_000, "checkpoint-6"),
    "checkpoint, all but the last": ("trainer", "_save_checkpoint", 1_155_072, "checkpoint-6"),
}


@pytest.mark.parametrize(("owner", "method", "room", "name"), PHASES.values(), ids=PHASES)
def test_full_disk_is_named_leaves_nothing_half_written_and_the_same_command_goes_on(
    tiny_model, tokenizer, train_dataset, eval_dataset, make_config, make_disk, owner, method, room, name
):
    disk = make_disk("8m")

    def build() -> SPINTrainer:
        config = make_config(
            output_dir=str(disk.path / "run"),
            num_iterations=1,
            save_strategy="epoch",
            resume="auto",
            opponent_reference="fixed",  # the first opponent is saved, since the model is not its folder's
        )
        return SPINTrainer(
            changed_model(tiny_model),
            config,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
        )

    trainer = build()
    before(trainer, owner, method, lambda: disk.fill(room))
    with pytest.raises(DiskError) as caught:
        trainer.train()
    message = str(caught.value)
    assert "No space left on device" in message and f"{trainer.store.output_dir}/{name}" in message
    assert "It needs " in message and "not known" not in message and "free there" in message
    assert "start the same command again" in message
    assert left_over(disk.path) == []
    assert not (trainer.store.output_dir / name).exists() or method == "write_metrics"
    assert trainer.store.checkpoints() == []

    disk.free()
    again = build()
    again.train()
    assert again.run.start.is_resumed == (method != "write_run")
    assert again.store.read_run()["finished"] and len(again.store.checkpoints()) == 1
    assert left_over(disk.path) == []


SCRIPT = """
import os
import sys
from pathlib import Path
from datasets import Dataset
from conftest import read_rows
from play_distributed import settings
from test_disk import before
from spin_trl import SPINConfig, SPINTrainer

model, disk, folder, rank, owner, method, room = sys.argv[1:]
config = SPINConfig(**settings(disk + "/run", save_strategy="epoch", num_iterations=1, learning_rate=1e-3, beta=0.1))
trainer = SPINTrainer(model, config, train_dataset=Dataset.from_list(read_rows("accent_train.jsonl", 30)))

def fill():
    if config.process_index == int(rank):
        with open(disk + "/filler", "wb", buffering=0) as filler:
            status = os.statvfs(disk)
            filler.write(bytes(status.f_bavail * status.f_frsize - int(room)))

before(trainer, owner, method, fill)
try:
    trainer.train()
except OSError as error:
    Path(folder, str(config.process_index)).write_text(type(error).__name__ + ": " + str(error))
"""


@pytest.mark.parametrize(
    ("rank", "owner", "method", "room", "name"),
    [
        (1, "store", "write_completions", 0, "/part-"),
        (0, "trainer", "_save_checkpoint", 0, "/checkpoint-2 could not"),
        (0, "trainer", "_save_checkpoint", 450_000, "/checkpoint-2 could not"),
    ],
    ids=["completions of the second process", "checkpoint of the first", "optimizer of the first"],
)
def test_full_disk_of_one_process_is_raised_on_both(tiny_model, make_disk, tmp_path, rank, owner, method, room, name):
    disk = make_disk("8m")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [
        str(tmp_path / "script.py"),
        tiny_model,
        str(disk.path),
        str(tmp_path),
        str(rank),
        owner,
        method,
        str(room),
    ]
    paths = f"{ROOT}:{ROOT / 'tests'}"
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for process in ("0", "1"):
        message = (tmp_path / process).read_text()
        assert message.startswith("DiskError: [Errno 28]") and name in message
    assert left_over(disk.path) == []


# Each writer, alone


def directory_of(content: str):
    def write(path: Path) -> None:
        path.mkdir()
        (path / "file").write_text(content)

    return write


WRITERS = {
    "text": lambda path: write_text(path, "a" * 200_000),
    "directory": lambda path: write_directory(path, directory_of("a" * 200_000), num_bytes=200_000),
    "safetensors": lambda path: write_file(
        path, lambda p: safetensors.torch.save_file({"a": torch.zeros(50_000)}, p), num_bytes=200_000
    ),
    "torch": lambda path: write_file(path, lambda p: torch.save(torch.zeros(50_000), p), num_bytes=200_000),
    "arrow": lambda path: write_directory(
        path, lambda p: Dataset.from_dict({"a": list(range(25_000))}).save_to_disk(p), num_bytes=200_000
    ),
}


@pytest.mark.parametrize("room", [0, 65_536])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_whoever_writes_a_full_disk_gives_the_same_error(make_disk, write, room):
    disk = make_disk("1m")
    disk.fill(room)
    with pytest.raises(DiskError, match=r"No space left.*/new could not be written\. It needs 200\.0 kB, and .* are"):
        write(disk.path / "new")
    assert [path.name for path in disk.path.iterdir()] == ["filler"]
    disk.free()
    write(disk.path / "new")
    assert [path.name for path in disk.path.iterdir()] == ["new"]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_whoever_writes_a_read_only_disk_gives_the_same_error(make_disk, write):
    disk = make_disk("1m")
    write_text(disk.path / "old", "kept")
    disk.make_read_only()
    with pytest.raises(DiskError, match=r"Read-only file system: .*/new could not be written.*Make it writable again"):
        write(disk.path / "new")
    assert [path.name for path in disk.path.iterdir()] == ["old"]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_whoever_writes_below_a_file_gives_the_same_error(tmp_path, write):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"Not a directory: .*/file/new could not be written"):
        write(tmp_path / "file" / "new")


def test_torch_and_safetensors_give_the_same_error_where_the_directory_is_there_already(make_disk):
    """Trainer writes into a directory that exists: there it is the libraries themselves that fail."""
    disk = make_disk("1m")
    disk.make_read_only()
    for save in (torch.save, lambda a, path: safetensors.torch.save_file({"a": a}, path)):
        with pytest.raises(DiskError, match="Read-only file system"), writing(disk.path / "new", num_bytes=4):
            save(torch.zeros(1), disk.path / "new")


def test_final_model_that_does_not_fit_is_the_same_error(tiny_model, train_dataset, make_config, make_disk):
    disk = make_disk("1m")
    disk.fill(room=100_000)
    trainer = SPINTrainer(tiny_model, make_config(), train_dataset=train_dataset)
    with pytest.raises(DiskError, match=r"/final could not be written\. It needs 36\d\.\d kB"):
        trainer.save_model(str(disk.path / "final"))


def test_log_of_a_managed_server_on_a_full_disk_is_an_error_before_the_server_starts(make_disk, tiny_model):
    disk = make_disk("1m")
    disk.fill()
    server = ManagedServer(disk.path / "vllm-server.log", timeout=1, model=tiny_model)
    with pytest.raises(DiskError, match=r"vllm-server\.log could not be written"):
        server.start(show_progress=False)
    assert server._process is None
    assert [path.name for path in disk.path.iterdir()] == ["filler"]


def test_read_only_run_directory_is_refused_before_a_model_is_loaded(make_disk, make_config, tmp_path, train_dataset):
    disk = make_disk("1m")
    disk.make_read_only()
    with pytest.raises(PermissionError, match=r"`output_dir` is .*read-only file system.*Choose a directory"):
        SPINTrainer("org/model", make_config(output_dir=str(disk.path / "run")), train_dataset=train_dataset)


def test_error_of_another_kind_stays_as_it_is(tmp_path):
    for error in (ValueError("a"), FileNotFoundError(2, "b"), RuntimeError("CUDA out of memory"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, writing(tmp_path / "a"):
            raise error
        assert caught.value is error


def test_error_can_go_to_another_process():
    with pytest.raises(DiskError) as caught, writing(Path("/proc/a"), num_bytes=2_500_000):
        raise OSError(28, "No space left on device")
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is DiskError and str(again) == str(caught.value) and again.errno == 28
    assert "It needs 2.5 MB" in str(again)


@pytest.mark.parametrize(
    ("num_bytes", "said"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (2_340_000_000, "2.3 GB")]
)
def test_bytes_are_said_in_the_unit_that_fits(num_bytes, said):
    assert readable(num_bytes) == said


# What a run will write


def size_on_disk(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


RUNS = {
    "all weights": {},
    "no checkpoints": {"save_strategy": "no"},
    "checkpoints without optimizer": {"save_only_model": True},
    "two epochs, two answers": {"epochs_per_iteration": 2, "num_generations": 2},
    "no history": {"num_history_iterations": 0},
    "adapter": {"peft_config": LoraConfig(r=8, target_modules="all-linear")},
    "fixed reference": {"opponent_reference": "fixed", "changed": True},
    "initial answers": {"loss_type": "t_spin"},
}


PAIRS_AND_THEIRS = ("pairs", "initial_answers")


@pytest.fixture
def rows() -> Dataset:
    return Dataset.from_list(read_rows("train.jsonl", 400))


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_estimate_is_within_a_factor_of_two_of_what_a_run_writes(
    tiny_model, tokenizer, rows, make_config, monkeypatch, settings
):
    footprints = []
    monkeypatch.setattr("spin_trl.play.checks.check_footprint", lambda *args: footprints.append(args))
    settings = {"save_strategy": "epoch", "per_device_train_batch_size": 64, "num_iterations": 2, **settings}
    peft_config, changed = settings.pop("peft_config", None), settings.pop("changed", False)
    trainer = SPINTrainer(
        changed_model(tiny_model) if changed else tiny_model,
        make_config(**settings),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.train()
    (footprint,) = footprints
    written = {
        "completions": sum(size_on_disk(trainer.store.path(i, "generations")) for i in range(2)),
        "data": size_on_disk(trainer.store.output_dir / "train_data"),
        "pairs": sum(size_on_disk(trainer.store.path(i, name)) for i in range(2) for name in PAIRS_AND_THEIRS),
        "opponents": sum(size_on_disk(trainer.store.path(i, "opponent")) for i in range(2)),
        "checkpoints": sum(size_on_disk(path) for path in trainer.store.checkpoints()),
    }
    for part, num_bytes in written.items():
        assert num_bytes / 2 <= getattr(footprint, part) <= num_bytes * 2, (part, num_bytes, footprint)
    total = size_on_disk(trainer.store.output_dir)
    assert total / 2 <= footprint.total <= total * 2
    assert footprint.lower_bound <= total


def test_run_that_cannot_fit_is_refused_before_its_weights_are_loaded(tiny_model, rows, make_config, make_disk):
    """Three checkpoints of 0.37 MB of weights each on a disk of 1 MB."""
    disk = make_disk("1m")
    config = make_config(output_dir=str(disk.path / "run"), save_strategy="epoch")
    loaded = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl.trainer.dpo_trainer.create_model_from_path", lambda *args, **kwargs: loaded.append(args))
        with pytest.raises(
            DiskError, match=r"The run writes about .* where 1\.0 MB are free.*alone need 1\.1 MB\. Free"
        ):
            SPINTrainer(tiny_model, config, train_dataset=rows)
    assert loaded == []
    SPINTrainer(tiny_model, make_config(output_dir=str(disk.path / "run")), train_dataset=rows)  # without checkpoints


def test_run_that_may_not_fit_is_warned_of_and_not_refused(tiny_model, rows, make_config, make_disk, caplog):
    disk = make_disk("3m")
    SPINTrainer(tiny_model, make_config(output_dir=str(disk.path / "run"), save_strategy="epoch"), train_dataset=rows)
    assert "That may not be enough" in caplog.text and "`save_total_limit`" in caplog.text


def test_run_that_fits_says_so_in_one_line_and_is_played_to_its_end(tiny_model, rows, make_config, make_disk, capsys):
    disk = make_disk("3m")
    config = make_config(output_dir=str(disk.path / "run"), num_iterations=2, save_strategy="epoch")
    trainer = SPINTrainer(tiny_model, config, train_dataset=rows)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("The run writes about")]
    assert "(opponents 0 bytes, checkpoints 2." in line and line.endswith("3.1 MB are free.")
    trainer.train()
    assert trainer.store.read_run()["finished"]
    assert size_on_disk(disk.path) > 2_400_000


def test_what_lies_there_already_counts_as_written(tiny_model, rows, make_config, make_disk):
    """A run that is resumed on a disk that its own checkpoints have filled."""
    disk = make_disk("3m")
    settings = {"output_dir": str(disk.path / "run"), "save_strategy": "epoch", "resume": "auto"}
    SPINTrainer(tiny_model, make_config(num_iterations=2, **settings), train_dataset=rows).train()
    disk.fill(room=100_000)
    again = SPINTrainer(tiny_model, make_config(num_iterations=2, **settings), train_dataset=rows)
    again.train()
    assert again.run.start.is_finished


def test_store_on_a_full_disk_keeps_what_was_complete(make_disk):
    disk = make_disk("1m")
    store = IterationStore(disk.path / "run", run_id="a-run")
    store.write_metrics(0, {"num_pairs": 3})
    disk.fill()
    with pytest.raises(DiskError, match=r"metrics\.json could not be written. It needs 31 bytes"):
        store.write_metrics(0, {"num_pairs": 4, "a": 1})
    assert store.read_metrics(0) == {"num_pairs": 3}
