"""Every benchmark runs, on toy sizes. What it measures is not looked at: no test asserts a time."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT


sys.path.insert(0, str(ROOT / "benchmarks"))  # benchmarks are scripts, not a package

from measure import fresh_processes, play_script  # noqa: E402


# Arguments besides `--quick`: which part of it runs, and the figure that the result must have.
BENCHMARKS = {
    "generation": ([], "spin_to"),
    "gpu": (["--device", "cpu"], "lora"),
    "iteration": ([], "spin_to_loop"),
    "pronunciation": ([], "rows"),
    "scale": ([], "seconds_ratio"),
    "training": ([], "speed"),
    "quality": (["--tasks", "language", "--methods", "spin"], None),
    "reliability": (["random_faults"], None),
}
PARTS = ("instant_server", "loop_dpo", "loop_generate", "measure")  # run by the others


def test_every_script_is_tried():
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert scripts == {*BENCHMARKS, *PARTS, "suite", "publish"}


@pytest.fixture(scope="module")
def pool():
    """Forks of a process that has done the imports, which take longer than most of the benchmarks on toy sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # set by the pool, and put back
        with fresh_processes("self_play_family.runs") as pool:
            yield pool


@pytest.mark.parametrize("name", BENCHMARKS)
def test_runs_on_toy_sizes(name, pool, tmp_path):
    arguments, figure = BENCHMARKS[name]
    words = [f"benchmarks/{name}.py", "--quick", "--output", str(tmp_path), *arguments]
    pool.submit(play_script, words, tmp_path / "log").result()
    if figure is not None:
        assert figure in json.loads((tmp_path / f"{name}.json").read_text())
    elif name == "quality":
        assert "| SPIN |" in (tmp_path / "quality" / "quality.md").read_text()
    else:
        assert " injected | 0 | `tests/test_random_faults.py` |" in (tmp_path / "log").read_text()


def test_the_suite_runs_those_it_is_asked_for(tmp_path):
    command = [sys.executable, "benchmarks/suite.py", "--quick", "--output", str(tmp_path), "publish"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    assert "speedup" in json.loads((tmp_path / "publish.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["publish.json"]
