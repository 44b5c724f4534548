"""What TensorBoard, W&B (offline) and trackio hold after a real run, read back from their own files."""

import json
import struct
from collections import Counter, defaultdict
from collections.abc import Iterator

import pytest
from play_short import play_in_process


# Two iterations of two steps: self-play's metrics come before an iteration's first step, DPOTrainer's at every step,
# and an evaluation before each iteration and after the last.
STEPS = {
    "train/self_play/rejected_length": [0, 2],
    "eval/nll": [0, 2, 4],
    "train/loss": [1, 2, 3, 4],
    "train/rewards/margins": [1, 2, 3, 4],
}


@pytest.fixture
def run(tiny_model, tmp_path):
    def play(report_to: str, fail_at: int = -1, **environment: str) -> None:
        config = {
            "output_dir": str(tmp_path / "run"),
            "report_to": report_to,
            "save_strategy": "steps",
            "save_steps": 1,
            "disable_tqdm": True,
        }
        play_in_process(tmp_path, environment, fail_at < 0, model=tiny_model, config=config, fail_at=fail_at)

    return play


def require_expected(entries: list[tuple[str, int]]) -> None:
    assert {name: sorted(step for found, step in entries if found == name) for name in STEPS} == STEPS
    every_time = ("train/epoch", "train/self_play/iteration")  # added to everything that is logged
    counts = Counter(entry for entry in entries if entry[0] not in every_time)
    assert max(counts.values()) == 1


def test_tensorboard_has_every_metric_at_its_step_also_after_a_resume(run, tmp_path):
    """What was logged behind the checkpoint is logged again, at the same step and of the same value."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run("tensorboard", fail_at=3)  # its checkpoint is step 2's: step 3 is taken again
    run("tensorboard")
    values = defaultdict(set)
    for folder in {path.parent for path in (tmp_path / "run" / "runs").rglob("events.*")}:
        events = accumulator.EventAccumulator(str(folder))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                values[tag, event.step].add(event.value)
    require_expected(list(values))
    assert all(len(found) == 1 for (tag, _), found in values.items() if tag.startswith("eval/"))


def wandb_records(content: bytes) -> Iterator[bytes]:
    """Records of W&B's file: LevelDB's log format (blocks of 32 KiB, parts with 7 bytes of header) after 7 bytes."""
    position, record = 7, b""
    while position + 7 <= len(content):
        room = 32768 - position % 32768
        if room < 7:  # no header fits in what is left of the block
            position += room
            continue
        _, size, kind = struct.unpack_from("<IHB", content, position)
        record += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # the whole record, or its last part
            yield record
            record = b""


def test_wandb_offline_has_every_metric_at_its_step_once(run, tmp_path):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    run("wandb", WANDB_MODE="offline", WANDB_DIR=str(tmp_path), WANDB_SILENT="true")
    entries = []
    for path in tmp_path.rglob("*.wandb"):
        for data in wandb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            step = items.pop("train/global_step", None)
            entries += [(name, step) for name in items if name.startswith(("train/", "eval/"))]
    require_expected(entries)


def test_trackio_has_every_metric_at_its_step_once(run, tmp_path):
    pytest.importorskip("trackio", reason="trackio is not installed: it wants an older pillow than vLLM brings")
    folder = tmp_path / "trackio"
    run("trackio", TRACKIO_DIR=str(folder))
    import sqlite3

    entries = []
    for path in folder.rglob("*.db"):
        for step, metrics in sqlite3.connect(path).execute("select step, metrics from metrics"):
            values = json.loads(metrics)
            step = values.pop("train/global_step", step)
            entries += [(name, step) for name in values if "/" in name]
    require_expected(entries)
