"""The guard against collapse on the demo's data, with a real server: it fires where it must, and only there."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT


pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
RECIPES = ROOT / "recipes"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A function that plays the demo with some fields overridden, and gives its `self_play.json` and its numbers."""
    folder = tmp_path_factory.mktemp("demo")
    start = folder / "sft"
    subprocess.run([sys.executable, RECIPES / "pronunciation_sft.py", "--output_dir", start], cwd=ROOT, check=True)

    def play(name: str, **overrides) -> tuple[dict, list[dict]]:
        output_dir = folder / name
        fields = {"model_name_or_path": start, "output_dir": output_dir, "report": False, **overrides}
        command = [sys.executable, RECIPES / "spin.py", "--config", RECIPES / "pronunciation.yaml"]
        command += [str(part) for name, value in fields.items() for part in (f"--{name}", value)]
        subprocess.run(command, cwd=ROOT, check=True)
        metrics = [json.loads(path.read_text()) for path in sorted(output_dir.glob("iteration-*/metrics.json"))]
        return json.loads((output_dir / "self_play.json").read_text()), metrics

    return play


def test_large_steps_end_the_run_after_iteration_0_or_1_with_the_policy_of_before(demo):
    run, metrics = demo("collapsing", learning_rate=2e-4, beta=0.1, on_collapse="rollback")
    assert run["collapsed"]["iteration"] in (1, 2)
    assert run["collapsed"]["returned_to"] == run["collapsed"]["iteration"] - 1
    assert "displacement" in metrics[run["collapsed"]["iteration"]]["collapse_signs"]


def test_the_demo_itself_is_healthy(demo):
    run, metrics = demo("healthy", on_collapse="stop")
    assert "collapsed" not in run and len(metrics) == 5
    assert [found["num_collapse_signs"] for found in metrics] == [0] * 5
