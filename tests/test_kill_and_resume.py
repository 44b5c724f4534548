"""A run killed anywhere, and started again by the same command, ends as if nothing had happened."""

import json
import multiprocessing
import random
import signal
from collections import defaultdict
from pathlib import Path

import kill_points
import pytest
from conftest import read_rows
from datasets import load_from_disk
from kill_points import FINAL_WEIGHTS, PLACES
from safetensors.torch import load_file

from spin_trl.iteration_store import IterationStore


NUM_KILLS = 20
NUM_QUICK_KILLS = 5
# A server that starts anew for every process prepares imports once and forks from there.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["kill_points"])


def start(model: str, output_dir: Path, kill_at: int | None = None, **settings) -> int:
    """Play in a process of its own; its exit status."""
    rows = read_rows("accent_train.jsonl", 32)
    process = FORKSERVER.Process(target=kill_points.play, args=(model, rows, str(output_dir), kill_at, settings))
    process.start()
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def undisturbed(tiny_model, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert start(tiny_model, output_dir) == 0
    return output_dir


def choose_kills(places: list[str], num_kills: int) -> list[int]:
    """Counts at which to kill, over all phases alike, repeatably."""
    by_phase = defaultdict(list)
    for count, phase in enumerate(places):
        by_phase[phase].append(count)
    chooser = random.Random(0)
    queues = [chooser.sample(by_phase[phase], len(by_phase[phase])) for phase in sorted(by_phase)]
    chosen = []
    while len(chosen) < num_kills:
        for queue in queues:
            if queue:
                chosen.append(queue.pop())
    return chosen[:num_kills]


def parts(output_dir: Path) -> dict[str, int]:
    """When each finished part was written."""
    return {str(path.relative_to(output_dir)): path.stat().st_mtime_ns for path in output_dir.rglob("part-*.parquet")}


def pairs(output_dir: Path, iteration: int) -> list[dict]:
    return load_from_disk(str(output_dir / f"iteration-{iteration}" / "pairs")).to_list()


def assert_ends_the_same(output_dir: Path, undisturbed: Path) -> None:
    for iteration in range(3):
        assert pairs(output_dir, iteration) == pairs(undisturbed, iteration)
    metrics, expected = (
        [found["evaluation"] for _, found in IterationStore(path).all_metrics()] for path in (output_dir, undisturbed)
    )
    assert metrics == expected and len(metrics) == 4
    weights, expected = load_file(output_dir / FINAL_WEIGHTS), load_file(undisturbed / FINAL_WEIGHTS)
    assert all((weights[name] == expected[name]).all() for name in expected) and len(weights) == len(expected)
    steps = [json.loads((newest_checkpoint(d) / "trainer_state.json").read_text()) for d in (output_dir, undisturbed)]
    assert steps[0]["global_step"] == steps[1]["global_step"] == 30
    assert [p.name for p in output_dir.rglob("*.tmp-*")] == []


def newest_checkpoint(output_dir: Path) -> Path:
    return IterationStore(output_dir).checkpoints()[0]


@pytest.mark.parametrize(
    "number",
    [pytest.param(n, marks=() if n < NUM_QUICK_KILLS else pytest.mark.slow) for n in range(NUM_KILLS)],
)
def test_killed_run_ends_as_the_undisturbed_one(tiny_model, undisturbed, tmp_path, number):
    """24 rows in parts of 6; 3 + 3 steps, then with history 6 + 6 and 6 + 6."""
    places = json.loads((undisturbed / PLACES).read_text())
    kill_at = choose_kills(places, NUM_KILLS)[number]
    print(f"killed at {kill_at} of {len(places)}: {places[kill_at]}")
    output_dir = tmp_path / "run"
    assert start(tiny_model, output_dir, kill_at) == -signal.SIGKILL
    finished = parts(output_dir)
    assert start(tiny_model, output_dir) == 0
    assert finished.items() <= parts(output_dir).items()
    assert_ends_the_same(output_dir, undisturbed)
