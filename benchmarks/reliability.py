"""What a run survives: kills, a failing server, failing processes. Prints the table of docs/reliability.md.

    make bench-reliability [ARGS="random_faults failing_runs"]   only some of the rows

Runs the tests of these, the slow ones too, and adds up what they recorded. The runs, their processes and, where it says
so, the vLLM servers are real.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree


ROOT = Path(__file__).parents[1]
KILLS, SERVER_KILLS, FAULTS, FAILURES = (
    f"tests/test_{name}.py" for name in ("kill_and_resume", "server_restarts", "random_faults", "failing_runs")
)


def run_tests(path: str, report: Path) -> list[dict[str, str]]:
    """What each test recorded. Ends the benchmark if one failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-o", "junit_family=xunit1", path]
    command += [f"--junitxml={report}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{path} failed:\n{done.stdout[-5000:]}")
    tests = ElementTree.parse(report).iter("testcase")
    return [{found.get("name"): found.get("value") for found in test.iter("property")} for test in tests]


def row(path: str, report: Path) -> tuple[str, str, str]:
    """What fails, what became of it, and how many completions were lost."""
    recorded = [test for test in run_tests(path, report) if test]
    if path == FAULTS:
        faults = sum(int(test["faults"]) for test in recorded)
        return "faults of a server, at random", f"{faults} injected", lost(recorded)
    if path == FAILURES:
        seconds = [float(test["seconds_until_all_ended"]) for test in recorded]
        ended = f"all ended after {min(seconds)} to {max(seconds)} s, in {len(seconds)} cases"
        return "one of two processes, by an error or SIGKILL", ended, "-"
    what = "a run, SIGKILL" if path == KILLS else "a real vLLM server in mid-work, SIGKILL"
    return what, f"{len(recorded)} killed, {len(recorded)} survived", lost(recorded)


def lost(recorded: list[dict[str, str]]) -> str:
    return str(sum(int(test["completions_lost"]) for test in recorded))


def main(names: list[str]) -> None:
    print("| what fails | outcome | completions lost | shown by |")
    print("| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for path in (KILLS, SERVER_KILLS, FAULTS, FAILURES):
            if not names or any(name in path for name in names):
                what, outcome, num_lost = row(path, Path(folder) / "report.xml")
                print(f"| {what} | {outcome} | {num_lost} | `{path}` |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
