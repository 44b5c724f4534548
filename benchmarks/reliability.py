"""What a run survives: kills, a failing server, failing processes. Prints the table of docs/reliability.md.

    make bench-reliability [ARGS="random_faults failing_runs"]   only some of the rows

Runs the tests of these, the slow ones too, and adds up what they recorded. The runs, their processes and, where it says
so, the vLLM servers are real. `--quick` runs one test of each.
"""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

from measure import ROOT, parse, parser


KILLS, SERVER_KILLS, FAULTS, FAILURES = FILES = [
    f"tests/test_{name}.py" for name in ("kill_and_resume", "server_restarts", "random_faults", "failing_runs")
]
Recorded = dict[str, str]


def pytest(*arguments: str) -> str:
    """What it printed. Ends the benchmark if a test failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stdout[-5000:]}")
    return done.stdout


def run_tests(path: str, report: Path, only_one: bool) -> list[Recorded]:
    """What each test recorded."""
    chosen = pytest("--collect-only", path).splitlines()[:1] if only_one else [path]
    pytest("-o", "junit_family=xunit1", f"--junitxml={report}", *chosen)
    tests = ElementTree.parse(report).iter("testcase")
    recorded = [{found.get("name"): found.get("value") for found in test.iter("property")} for test in tests]
    return [test for test in recorded if test]


def row(path: str, recorded: list[Recorded]) -> tuple[str, str, str]:
    """What fails, what became of it, and how many completions were lost."""
    if path == FAILURES:
        seconds = [float(test["seconds_until_all_ended"]) for test in recorded]
        ended = f"all ended after {min(seconds)} to {max(seconds)} s, in {len(seconds)} cases"
        return "one of two processes, by an error or SIGKILL", ended, "-"
    lost = str(sum(int(test["completions_lost"]) for test in recorded))
    if path == FAULTS:
        faults = sum(int(test["faults"]) for test in recorded)
        return "faults of a server, at random", f"{faults} injected", lost
    what = "a run, SIGKILL" if path == KILLS else "a real vLLM server in mid-work, SIGKILL"
    return what, f"{len(recorded)} killed, {len(recorded)} survived", lost


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("names", nargs="*", help=f"rows, by parts of {', '.join(FILES)}")
    options = parse(arguments)
    print("| what fails | outcome | completions lost | shown by |")
    print("| --- | --- | --- | --- |")
    with TemporaryDirectory() as folder:
        for path in FILES:
            if not options.names or any(name in path for name in options.names):
                recorded = run_tests(path, Path(folder) / "report.xml", options.quick)
                print(f"| {' | '.join(row(path, recorded))} | `{path}` |", flush=True)


if __name__ == "__main__":
    main()
