"""A run killed anywhere, and started again by the same command, ends as if nothing had happened."""

import json
import multiprocessing
import os
import random
import signal
from pathlib import Path
from unittest import mock

import kill_points
import pytest
from conftest import ROOT, read_rows
from kill_points import PLACES

from spin_trl import load_pairs
from spin_trl.run_directory.store import IterationStore


# What is played, and where the run is killed; see `KillAt.kind_of`.
QUICK = [
    ("judged", "save"),
    ("judged", "training"),
    ("judged", "rewards"),
    ("server", "opponent"),
]
SLOW_PLACES = "pairs checkpoint mark generations evaluation metrics train_data self_play README".split()
SLOW = [("in-process", place) for place in [*SLOW_PLACES, "step_end", "epoch_end"]]
SLOW += [("judged", "pairs"), ("t_spin", "initial_answers"), ("t_spin", "inference")]
SLOW += [("server", "generations"), ("managed", "server start")]
SETTINGS = {
    "in-process": {"use_vllm": False},
    "judged": {"use_vllm": False, "pairing": "best_of"},  # with rewards and preferences
    "t_spin": {"use_vllm": False, "loss_type": "t_spin", "t_spin_beta": 0.5},
    "server": {"use_vllm": None},  # with its address
    "managed": {"use_vllm": True},
}
# It imports once, and forks a process for every run.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["kill_points"])
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # else Python 3.11's server finds no such module, silently


def start(model: str, output_dir: Path, settings: dict, kill_at: int | str | None = None) -> int:
    """Play in a process of its own; its exit status."""
    rows = read_rows("accent_train.jsonl", 32)
    process = FORKSERVER.Process(target=kill_points.play, args=(model, rows, str(output_dir), kill_at, settings))
    with mock.patch.dict(os.environ, PYTHONPATH=PATHS):
        process.start()
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def undisturbed(tiny_model, tmp_path_factory, request):
    """A function that gives the directory of an undisturbed run of this kind, and the settings."""
    runs = {}

    def get(kind: str) -> tuple[Path, dict]:
        if kind == "managed":  # which is to end as with a server that was there
            return get("server")[0], SETTINGS[kind]
        if kind == "server":
            SETTINGS[kind]["vllm_server_base_url"] = request.getfixturevalue("lora_server").base_url
        if kind not in runs:
            runs[kind] = tmp_path_factory.mktemp("undisturbed") / "run"
            assert start(tiny_model, runs[kind], SETTINGS[kind]) == 0
        return runs[kind], SETTINGS[kind]

    return get


def choose_kill(places: list[str], place: str) -> int | str:
    """One of the counts at a place; which, repeats. Where the undisturbed run never was: the place."""
    counts = [count for count, name in enumerate(places) if name == place]
    return random.Random(0).choice(counts) if counts else place


def parts(output_dir: Path) -> dict[str, int]:
    """When each finished part was written."""
    return {str(path.relative_to(output_dir)): path.stat().st_mtime_ns for path in output_dir.rglob("part-*.parquet")}


def assert_ends_the_same(output_dir: Path, undisturbed: Path) -> None:
    for number in range(2):
        assert load_pairs(output_dir, number).to_list() == load_pairs(undisturbed, number).to_list()
    stores = [IterationStore(directory) for directory in (output_dir, undisturbed)]
    metrics, expected = ([found["evaluation"] for _, found in store.all_metrics()] for store in stores)
    assert metrics == expected and len(metrics) == 3
    weights, expected = ((store.checkpoints()[0] / "adapter_model.safetensors").read_bytes() for store in stores)
    assert weights == expected
    states = [json.loads((store.checkpoints()[0] / "trainer_state.json").read_text()) for store in stores]
    assert states[0]["global_step"] == states[1]["global_step"]
    assert [p.name for p in output_dir.rglob("*.tmp-*")] == []
    assert len(stores[0].checkpoints()) == len(list(output_dir.glob("checkpoint-*")))  # all are whole


@pytest.mark.parametrize(("kind", "place"), [*QUICK, *(pytest.param(*kill, marks=pytest.mark.slow) for kill in SLOW)])
def test_killed_run_ends_as_the_undisturbed_one(tiny_model, undisturbed, tmp_path, record_property, kind, place):
    """24 rows in parts of 6; 3 + 3 steps, then with history 6 + 6. Judged, 4 preferences join: 4 + 4, then 7 + 7."""
    expected, settings = undisturbed(kind)
    kill_at = choose_kill(json.loads((expected / PLACES).read_text()), place)
    output_dir = tmp_path / "run"
    assert start(tiny_model, output_dir, settings, kill_at) == -signal.SIGKILL
    finished = parts(output_dir)
    assert start(tiny_model, output_dir, settings) == 0
    assert finished.items() <= parts(output_dir).items()  # nothing was generated twice
    assert_ends_the_same(output_dir, expected)
    if kind == "judged":  # what is chosen: a ground truth, a generation, a preference's own
        pairs = [pair for iteration in range(2) for pair in load_pairs(output_dir, iteration)]
        assert {pair["chosen_sample"] for pair in pairs} == {-1, 0, None}
    record_property("completions_lost", 0)  # for `make bench-reliability`
