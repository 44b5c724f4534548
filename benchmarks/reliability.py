"""What a run survives: kills, a failing server, failing processes. Prints the table of the README.

    make bench-reliability

Runs the tests of these, the slow ones too, and adds up what they recorded. The runs, their processes and, where it says
so, the vLLM servers are real.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree


ROOT = Path(__file__).parents[1]
KILLS, SERVER_KILLS, FAULTS, FAILURES = (
    f"tests/test_{name}.py" for name in ("kill_and_resume", "server_restarts", "random_faults", "failing_runs")
)


def run_tests(path: str, report: Path) -> list[dict[str, str]]:
    """What each test recorded. Ends the benchmark if one failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", path, f"--junitxml={report}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{path} failed:\n{done.stdout[-5000:]}")
    tests = ElementTree.parse(report).iter("testcase")
    return [{found.get("name"): found.get("value") for found in test.iter("property")} for test in tests]


def rows() -> Iterator[tuple[str, ...]]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        for path, what in ((KILLS, "a run, SIGKILL"), (SERVER_KILLS, "a real vLLM server in mid-work, SIGKILL")):
            recorded = run_tests(path, report)
            killed = [test for test in recorded if "killed" in test]
            yield path, what, f"{len(killed)} killed, {len(killed)} survived", lost(killed)
        recorded = run_tests(FAULTS, report)
        faults = sum(int(test["faults"]) for test in recorded)
        yield FAULTS, "faults of a server, at random", f"{faults} injected", lost(recorded)
        seconds = [float(t["seconds_until_all_ended"]) for t in run_tests(FAILURES, report) if len(t) > 0]
        ended = f"all ended after {min(seconds)} to {max(seconds)} s, in {len(seconds)} cases"
        yield FAILURES, "one of two processes, by an error or SIGKILL", ended, "-"


def lost(recorded: list[dict[str, str]]) -> str:
    return str(sum(int(test["completions_lost"]) for test in recorded))


def main() -> None:
    print("| what fails | outcome | completions lost | shown by |")
    print("| --- | --- | --- | --- |")
    for path, what, outcome, num_lost in rows():
        print(f"| {what} | {outcome} | {num_lost} | `{path}` |", flush=True)


if __name__ == "__main__":
    main()
