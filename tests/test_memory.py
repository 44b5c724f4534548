"""Nothing that an iteration makes outlives it."""

import json

import pytest
from play_distributed import play, settings
from test_distributed import TRAIN_FILE, launch

from spin_trl import SPINConfig


NUM_ITERATIONS = 3
SAME_SIZE = {  # every iteration is as large as every other
    "num_iterations": NUM_ITERATIONS,
    "num_history_iterations": 0,
    "learning_rate": 1e-3,
    "beta": 0.1,
}


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_no_iteration_leaves_anything_behind(adapter, tiny_model, tmp_path):
    seen = play(tiny_model, str(TRAIN_FILE), SPINConfig(**settings(str(tmp_path), **SAME_SIZE)), adapter)
    assert_nothing_grows(seen["live"])


@pytest.mark.slow
def test_no_iteration_leaves_anything_behind_in_two_processes(tiny_model, tmp_path):
    arguments = [argument for name, value in SAME_SIZE.items() for argument in (f"--{name}", str(value))]
    done = launch("ddp", tmp_path, [tiny_model, str(TRAIN_FILE), str(tmp_path / "out"), *arguments])
    assert done.returncode == 0, done.stderr[-5000:]
    for rank in range(2):
        assert_nothing_grows(json.loads((tmp_path / "out" / f"seen-{rank}.json").read_text())["live"])


def assert_nothing_grows(live: list[dict[str, int]]) -> None:
    """Counted at the first step of each iteration. The first has no optimizer state yet to have been emptied."""
    assert len(live) == NUM_ITERATIONS
    assert live[2] == live[1]
    assert min(live[1][kind] for kind in ("tensors", "numbers", "datasets", "loaders", "modules")) > 0
