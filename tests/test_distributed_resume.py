"""A run of two processes, ended by SIGTERM to one of them within an iteration, goes on to the same losses."""

import json

import pytest
import torch
from test_distributed import TRAIN_FILE, launch, slow

from spin_trl.run_directory.checkpoints import Place
from spin_trl.run_directory.store import IterationStore


@pytest.mark.parametrize(
    "name",
    ["ddp", pytest.param("zero2", marks=slow), pytest.param("zero3", marks=slow), pytest.param("fsdp2", marks=slow)],
)
def test_run_goes_on_where_sigterm_to_one_process_stopped_both(name, tiny_model, tmp_path):
    """Four steps, then eight; stopped in the seventh or, if the signal came late, the one after."""

    def play(folder: str, **variables: str):
        arguments = [tiny_model, str(TRAIN_FILE), str(tmp_path / folder), "--resume", "auto"]
        arguments += ["--save_strategy", "steps", "--save_steps", "100", "--temperature", "0"]
        if name == "fsdp2":
            arguments += ["--use_cpu", "false"]
        return launch(name, tmp_path, arguments, **variables)

    def losses(folder: str) -> list[list[float]]:
        return [json.loads((tmp_path / folder / f"seen-{rank}.json").read_text())["loss"] for rank in range(2)]

    undisturbed = play("undisturbed")
    assert undisturbed.returncode == 0, undisturbed.stderr[-5000:]
    stopped = play("run", SIGTERM_AT="1:6")
    assert stopped.returncode != 0 and "Stopped by SIGTERM after step" in stopped.stdout, stopped.stderr[-5000:]
    place = Place.read(IterationStore(tmp_path / "run").checkpoints()[0])
    assert place.iteration == 1 and place.step in (7, 8) and not place.is_iteration_done
    resumed = play("run")
    assert resumed.returncode == 0, resumed.stderr[-5000:]
    assert f"goes on from checkpoint-{place.step}: iteration 1" in resumed.stdout
    assert len(losses("run")[0]) == 12
    torch.testing.assert_close(losses("run"), losses("undisturbed"), atol=1e-6, rtol=0)
