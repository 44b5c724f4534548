"""A run killed anywhere, and started again by the same command, ends as if nothing had happened."""

import json
import multiprocessing
import random
import signal
from pathlib import Path

import kill_points
import pytest
from conftest import read_rows
from kill_points import FINAL_WEIGHTS, PLACES
from safetensors.torch import load_file

from spin_trl import load_pairs
from spin_trl.run_directory.store import IterationStore


# How the opponent is sampled, and where the run is killed; see `KillAt.kind_of`.
QUICK = [
    ("in-process", "saved, not marked"),
    ("in-process", "training"),
    ("in-process", "pairs"),
    ("server", "opponent"),
]
SLOW_PLACES = "checkpoint mark inference generations evaluation metrics train_data self_play README".split()
SLOW = [("in-process", place) for place in [*SLOW_PLACES, "step begins", "step ends", "epoch ends"]]
SLOW += [("server", "generations"), ("managed", "server start")]
# It prepares imports once, and forks a process for every run.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["kill_points"])


def start(model: str, output_dir: Path, settings: dict, kill_at: int | str | None = None) -> int:
    """Play in a process of its own; its exit status."""
    rows = read_rows("accent_train.jsonl", 32)
    process = FORKSERVER.Process(target=kill_points.play, args=(model, rows, str(output_dir), kill_at, settings))
    process.start()
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def undisturbed(tiny_model, tmp_path_factory, request):
    """A function that gives the directory of an undisturbed run with this kind of sampler, and its settings."""
    runs = {}

    def get(sampler: str) -> tuple[Path, dict]:
        settings = {"use_vllm": False}
        if sampler != "in-process":
            server = request.getfixturevalue("lora_server")
            settings = {"vllm_server_base_url": server.base_url}
        compared_with = "in-process" if sampler == "in-process" else "server"
        if compared_with not in runs:
            runs[compared_with] = tmp_path_factory.mktemp("undisturbed") / "run"
            assert start(tiny_model, runs[compared_with], settings) == 0
        return runs[compared_with], {"use_vllm": True} if sampler == "managed" else settings

    return get


def choose_kill(places: list[str], place: str) -> int | str:
    """One of the counts at a place; which, repeats. Where the undisturbed run never was: the place."""
    counts = [count for count, name in enumerate(places) if name == place]
    return random.Random(0).choice(counts) if counts else place


def parts(output_dir: Path) -> dict[str, int]:
    """When each finished part was written."""
    return {str(path.relative_to(output_dir)): path.stat().st_mtime_ns for path in output_dir.rglob("part-*.parquet")}


def pairs(output_dir: Path, iteration: int) -> list[dict]:
    return load_pairs(output_dir, iteration).to_list()


def assert_ends_the_same(output_dir: Path, undisturbed: Path, num_steps: int = 30) -> None:
    for iteration in range(3):
        assert pairs(output_dir, iteration) == pairs(undisturbed, iteration)
    metrics, expected = (
        [found["evaluation"] for _, found in IterationStore(path).all_metrics()] for path in (output_dir, undisturbed)
    )
    assert metrics == expected and len(metrics) == 4
    weights, expected = load_file(output_dir / FINAL_WEIGHTS), load_file(undisturbed / FINAL_WEIGHTS)
    assert all((weights[name] == expected[name]).all() for name in expected) and len(weights) == len(expected)
    steps = [json.loads((newest_checkpoint(d) / "trainer_state.json").read_text()) for d in (output_dir, undisturbed)]
    assert steps[0]["global_step"] == steps[1]["global_step"] == num_steps
    assert [p.name for p in output_dir.rglob("*.tmp-*")] == []
    assert len(IterationStore(output_dir).checkpoints()) == len(list(output_dir.glob("checkpoint-*")))  # all are whole


def newest_checkpoint(output_dir: Path) -> Path:
    return IterationStore(output_dir).checkpoints()[0]


@pytest.mark.parametrize(
    ("sampler", "place"), [*QUICK, *(pytest.param(*kill, marks=pytest.mark.slow) for kill in SLOW)]
)
def test_killed_run_ends_as_the_undisturbed_one(tiny_model, undisturbed, tmp_path, record_property, sampler, place):
    """24 rows in parts of 6; 3 + 3 steps, then with history 6 + 6 and 6 + 6."""
    expected, settings = undisturbed(sampler)
    kill_at = choose_kill(json.loads((expected / PLACES).read_text()), place)
    output_dir = tmp_path / "run"
    assert start(tiny_model, output_dir, settings, kill_at) == -signal.SIGKILL
    finished = parts(output_dir)
    assert start(tiny_model, output_dir, settings) == 0
    assert finished.items() <= parts(output_dir).items()  # nothing was generated twice
    assert_ends_the_same(output_dir, expected)
    record_property("completions_lost", 0)  # for `make bench-reliability`


JUDGED = {"use_vllm": False, "pairing": "best_of"}


@pytest.fixture(scope="module")
def judged(tiny_model, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("judged") / "run"
    assert start(tiny_model, output_dir, JUDGED) == 0
    return output_dir


@pytest.mark.parametrize("place", ["rewards", pytest.param("pairs", marks=pytest.mark.slow)])
def test_run_with_rewards_and_preferences_killed_while_it_judges_ends_as_the_undisturbed_one(
    tiny_model, judged, tmp_path, place
):
    """4 preferences join the 24 pairs: 4 + 4 steps, then with history 7 + 7 and 7 + 7."""
    places = json.loads((judged / PLACES).read_text())
    kill_at = choose_kill(places, place)
    assert start(tiny_model, tmp_path / "run", JUDGED, kill_at) == -signal.SIGKILL
    assert start(tiny_model, tmp_path / "run", JUDGED) == 0
    assert_ends_the_same(tmp_path / "run", judged, num_steps=36)
    chosen = {pair["chosen_sample"] for iteration in range(3) for pair in pairs(judged, iteration)}
    assert chosen == {-1, 0, None}  # a ground truth, a generation, a preference's own
