"""What TensorBoard and W&B (offline) hold after a real run that was stopped, read back from their own files."""

import json
import struct
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

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
EVERY_TIME = ("train/epoch", "train/self_play/iteration")  # added to everything that is logged
Entries = list[tuple[str, int, float]]  # name, step, value


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory) -> Path:
    """Of a run that failed at step 3, with a checkpoint of step 2, and went on: step 3 is taken twice."""
    folder = tmp_path_factory.mktemp("tracked")
    pytest.importorskip("wandb")
    variables = {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "WANDB_SILENT": "true"}
    config = {"output_dir": str(folder / "run"), "report_to": ["tensorboard", "wandb"]}
    config |= {"save_strategy": "steps", "save_steps": 1, "disable_tqdm": True}
    for fail_at in (3, -1):
        play_in_process(folder, variables, fail_at < 0, model=tiny_model, config=config, fail_at=fail_at)
    return folder


def of_tensorboard(folder: Path) -> Iterator[Entries]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for path in {path.parent for path in (folder / "run" / "runs").rglob("events.*")}:
        events = accumulator.EventAccumulator(str(path))
        events.Reload()
        yield [(tag, e.step, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]


def of_wandb(folder: Path) -> Iterator[Entries]:
    from wandb.proto import wandb_internal_pb2

    for path in folder.rglob("*.wandb"):
        entries = []
        for data in wandb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            step = items.pop("train/global_step", None)
            entries += [(name, step, value) for name, value in items.items() if name.startswith(("train/", "eval/"))]
        yield entries


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


@pytest.mark.parametrize("read", [of_tensorboard, of_wandb])
def test_every_metric_is_there_at_its_step_once_and_of_one_value_also_after_a_resume(folder, read):
    values = defaultdict(set)
    starts = list(read(folder))
    assert len(starts) == 2
    for entries in starts:
        counts = Counter((name, step) for name, step, _ in entries if name not in EVERY_TIME)
        assert max(counts.values()) == 1
        for name, step, value in entries:
            values[name, step].add(value)
    assert {name: sorted(step for found, step in values if found == name) for name in STEPS} == STEPS
    assert all(len(found) == 1 for (name, _), found in values.items() if name.startswith("eval/"))
