"""What a run survives: kills, a failing server, failing processes. Prints the table of docs/reliability.md.

    make bench-reliability [ARGS="random_faults failing_runs"]   only some of the rows

Runs the tests of these, the slow ones too, and adds up what they recorded. The runs, their processes and, where it says
so, the vLLM servers are real. `--quick` runs one test of each.
"""

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

import pytest
from measure import ROOT, fresh_processes, parse, parser


KILLS, SERVER_KILLS, FAULTS, FAILURES = FILES = [
    f"tests/test_{name}.py" for name in ("kill_and_resume", "server_restarts", "random_faults", "failing_runs")
]
Recorded = dict[str, str]


class OnlyTheFirst:
    """A plugin of pytest that leaves out all tests but one."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        del items[1:]


def call_pytest(path: str, report: Path, only_one: bool) -> str:
    """In a process of its own. What it says if a test failed, else nothing."""
    words = ["-q", "-p", "no:cacheprovider", "-m", "not gpu", "-o", "junit_family=xunit1", f"--junitxml={report}"]
    with redirect_stdout(StringIO()) as said:
        status = pytest.main([*words, str(ROOT / path)], plugins=[OnlyTheFirst()] if only_one else [])
    return "" if status == 0 else said.getvalue()


def run_tests(path: str, report: Path, only_one: bool) -> list[Recorded]:
    """What each test recorded. Ends the benchmark if one failed."""
    with fresh_processes("spin_trl") as pool:
        if failures := pool.submit(call_pytest, path, report, only_one).result():
            raise SystemExit(f"{path} failed:\n{failures[-5000:]}")
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
