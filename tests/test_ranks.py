"""Work of one or all processes: results, errors that every process sees, and how soon all end."""

import json
import os
import signal
import textwrap
import time
from pathlib import Path

import pytest
from two_processes import LIMIT, TwoProcesses

from spin_trl.processes.ranks import failing_together, main_process_first, on_every_process, on_main_process


def failing_together_with(function):
    with failing_together():
        return function()


def fail():
    raise FileExistsError("the folder is taken")


@pytest.mark.parametrize("run", [on_main_process, on_every_process, main_process_first, failing_together_with])
def test_single_process_gets_its_result_or_its_error_as_it_was_raised(run):
    assert run(lambda: {"a": [1]}) == {"a": [1]}
    with pytest.raises(FileExistsError, match="^the folder is taken$") as error:
        run(fail)
    assert error.traceback[-1].name == "fail"
    assert not hasattr(error.value, "__notes__")


PREAMBLE = """
    import json, os, signal, sys, time, traceback
    from datetime import timedelta
    from pathlib import Path
    import torch
    from accelerate import PartialState
    from spin_trl.processes.ranks import failing_together, main_process_first, on_every_process, on_main_process
    from spin_trl.processes.ranks import raise_if_another_failed

    folder = Path(sys.argv[1])
    state = PartialState(cpu=True, timeout=timedelta(seconds=2))  # for collectives
    rank, seen = state.process_index, {"count": state.num_processes}

    def fail_on(ranks, kind):
        def work():
            if rank in ranks:
                raise kind(f"rank {rank} failed")
            return rank
        return work

    def attempt(name, run, *work):
        started = time.monotonic()
        try:
            seen[name] = run(*work)
        except BaseException as error:
            seen[name] = "".join(traceback.format_exception_only(error))
        seen[name + "_seconds"] = time.monotonic() - started
        (folder / str(rank)).write_text(json.dumps(seen))
"""


def start(folder: Path, script: str) -> TwoProcesses:
    """Run a script after `PREAMBLE`."""
    path = folder / "script.py"
    ending = "state.destroy_process_group()\n"  # without it gloo may abort a process that ends
    path.write_text(textwrap.dedent(PREAMBLE) + textwrap.dedent(script) + ending)
    return TwoProcesses(folder, str(path), str(folder))


@pytest.fixture(scope="module")
def seen_by_two_processes(tmp_path_factory) -> list[dict]:
    """What each got or saw raised."""
    script = """
    attempt("main", on_main_process, lambda: [rank, "from main"])
    attempt("every", on_every_process, lambda: rank)
    attempt("main_fails", on_main_process, fail_on([0], FileExistsError))
    attempt("second_fails", on_every_process, fail_on([1], FileExistsError))
    attempt("both_fail", on_every_process, fail_on([0, 1], OSError))
    attempt("interrupted", on_every_process, fail_on([1], KeyboardInterrupt))
    attempt("terminated", on_main_process, lambda: sys.exit(143))
    attempt("main_after", on_main_process, lambda: "still in step")

    def unpicklable(message):
        return type("Local", (Exception,), {})(message)

    attempt("unpicklable", on_main_process, fail_on([0], unpicklable))
    attempt("unpicklable_result", on_main_process, lambda: lambda: None)

    class OfProcessOneAlone(Exception):
        pass

    if rank == 0:
        del OfProcessOneAlone
    attempt("unknown_class", on_every_process, lambda: fail_on([1], OfProcessOneAlone if rank else None)())
    attempt("huge", on_main_process, lambda: fail_on([0], ValueError)() if rank else int("x" * 20_000_000))

    def work_while_the_other_fails():
        if rank == 1:
            raise ValueError("rank 1 failed")
        while True:
            raise_if_another_failed()
            time.sleep(0.01)

    attempt("long_work", on_every_process, work_while_the_other_fails)

    def wait_for_one_that_failed_elsewhere():
        with failing_together():
            on_every_process(lambda: None)
            fail_on([1], ZeroDivisionError)()
            on_every_process(lambda: None)

    attempt("elsewhere", wait_for_one_that_failed_elsewhere)

    def fails_within():
        with failing_together():
            on_every_process(lambda: on_every_process(fail_on([1], KeyError)))

    attempt("fails_within", fails_within)

    def fails_again():
        try:
            on_main_process(fail_on([0], OSError))
        except OSError:  # while the first error is still being handled
            on_every_process(fail_on([1], ZeroDivisionError))

    attempt("fails_again", fails_again)

    order = folder / "order"
    def take_turn():
        time.sleep(0.3 * (rank == 0))
        with order.open("a") as file:
            file.write(str(rank))
        return rank

    attempt("turn", main_process_first, take_turn)
    attempt("order", on_main_process, order.read_text)
    attempt("slow_main", on_main_process, lambda: time.sleep(5) or "done")
    attempt("slow_second", on_every_process, lambda: time.sleep(5 * rank) or "done")

    for number in range(300):  # now one is ahead, now the other
        if on_every_process(lambda: number) != on_main_process(lambda: number):
            raise AssertionError(f"out of step in round {number}")
    """
    folder = tmp_path_factory.mktemp("ranks")
    with start(folder, script) as processes:
        assert processes.wait() == 0, processes.output()
    return [json.loads((folder / str(rank)).read_text()) for rank in range(2)]


def test_every_process_gets_the_main_ones_result_or_its_own(seen_by_two_processes):
    first, second = seen_by_two_processes
    assert first["count"] == second["count"] == 2
    assert first["main"] == second["main"] == [0, "from main"]
    assert (first["every"], second["every"]) == (0, 1)


def test_error_of_any_process_is_raised_on_all_with_where_it_came_from(seen_by_two_processes):
    first, second = seen_by_two_processes
    told = "FileExistsError: rank {0} failed\nProcess {0} failed with FileExistsError: rank {0} failed\nTraceback"
    assert first["main_fails"] == "FileExistsError: rank 0 failed\n"
    assert told.format(0) in second["main_fails"]
    assert told.format(1) in first["second_fails"]
    assert (first["both_fail"], second["both_fail"]) == ("OSError: rank 0 failed\n", "OSError: rank 1 failed\n")
    for seen in seen_by_two_processes:
        assert seen["interrupted"].startswith("KeyboardInterrupt")
        assert seen["terminated"].startswith("SystemExit: 143")
        assert seen["main_after"] == "still in step"


def test_error_that_cannot_be_sent_as_it_is_names_process_type_and_text(seen_by_two_processes):
    first, second = seen_by_two_processes
    assert first["unpicklable"].endswith("Local: rank 0 failed\n")
    assert second["unpicklable"].startswith("RuntimeError: Process 0 failed with Local: rank 0 failed")
    assert first["unknown_class"].startswith("RuntimeError: Process 1 failed with OfProcessOneAlone: rank 1 failed")
    assert "pickle" in first["unpicklable_result"] and "pickle" in second["unpicklable_result"]
    assert second["huge"].startswith(("ValueError", "RuntimeError: Process 0 failed with ValueError"))


def test_long_work_of_one_process_ends_when_another_fails(seen_by_two_processes):
    for seen in seen_by_two_processes:
        assert "ValueError: rank 1 failed" in seen["long_work"] and seen["long_work_seconds"] < 5


def test_error_outside_the_calls_and_within_nested_ones_is_raised_on_all(seen_by_two_processes):
    for seen in seen_by_two_processes:
        assert "ZeroDivisionError: rank 1 failed" in seen["elsewhere"]
        assert "KeyError: 'rank 1 failed'" in seen["fails_within"]
        assert "ZeroDivisionError: rank 1 failed" in seen["fails_again"]


def test_main_process_goes_first(seen_by_two_processes):
    assert [seen["turn"] for seen in seen_by_two_processes] == [0, 1]
    assert seen_by_two_processes[0]["order"] == "01"


def test_work_may_take_longer_than_the_time_limit_of_the_process_group(seen_by_two_processes):
    for seen in seen_by_two_processes:
        for name in ("slow_main", "slow_second"):
            assert seen[name] == "done" and seen[f"{name}_seconds"] > 4


@pytest.mark.slow
def test_process_that_cannot_look_is_soon_ended_by_the_launcher(tmp_path, record_property):
    """It sleeps, deaf to signals, as one that waits in a collective on a GPU."""
    script = """
    with failing_together():
        on_every_process(lambda: None)
        if rank == 1:
            (folder / "failed-at").write_text(str(time.time()))
            raise FloatingPointError("step 7")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(500)
    """
    with start(tmp_path, script) as processes:
        assert processes.wait() != 0
        seconds = time.time() - float((tmp_path / "failed-at").read_text())
        record_property("seconds_until_all_ended", round(seconds, 1))
        assert seconds < LIMIT
        assert "FloatingPointError: step 7" in processes.output(1)


def test_waiting_process_hears_signals_and_the_working_one_of_it(tmp_path):
    script = """
    if rank == 1:
        (folder / "pid").write_text(str(os.getpid()))
    on_main_process(lambda: [raise_if_another_failed() or time.sleep(0.1) for _ in range(5000)])
    """
    with start(tmp_path, script) as processes:
        pid = processes.wait_for("pid")
        time.sleep(1)
        os.kill(int(pid.read_text()), signal.SIGINT)
        assert processes.wait() != 0
        assert "KeyboardInterrupt" in processes.output(0) and "KeyboardInterrupt" in processes.output(1)
