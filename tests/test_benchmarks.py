"""Every benchmark runs, on toy sizes. What it measures is not looked at: no test asserts a time."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT


# Arguments besides `--quick`: which part of it runs, and the figure that the result must have.
BENCHMARKS = {
    "generation": ([], "spin_to"),
    "gpu": (["--device", "cpu"], "lora"),
    "iteration": ([], "spin_to_loop"),
    "pronunciation": ([], "rows"),
    "publish": ([], "speedup"),
    "training": ([], "speed"),
    "suite": (["scale"], None),
    "quality": (["--tasks", "language", "--methods", "sft", "spin"], None),
    "reliability": (["random_faults"], None),
}
PARTS = ("instant_server", "loop_dpo", "loop_generate", "measure", "scale")  # run by the others


def test_every_script_is_tried():
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert scripts == {*BENCHMARKS, *PARTS}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_runs_on_toy_sizes(name, tmp_path):
    arguments, figure = BENCHMARKS[name]
    command = [sys.executable, f"benchmarks/{name}.py", "--quick", "--output", str(tmp_path), *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    if figure is not None:
        assert figure in json.loads((tmp_path / f"{name}.json").read_text())
    elif name == "suite":
        assert "seconds_ratio" in json.loads((tmp_path / "scale.json").read_text())
    elif name == "quality":
        assert "| SPIN |" in (tmp_path / "quality" / "quality.md").read_text()
    else:
        assert " injected | 0 | `tests/test_random_faults.py` |" in done.stdout
