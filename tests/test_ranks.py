"""Work of one or all processes: results, and errors that every process sees."""

import json
import signal
import textwrap
from pathlib import Path

import pytest
from torch.distributed import TCPStore
from two_processes import PATIENCE, TwoProcesses

from spin_trl.processes.peers import Peers
from spin_trl.processes.ranks import failing_together, main_process_first, on_every_process, on_main_process


def failing_together_with(function):
    with failing_together():
        return function()


def fail():
    raise FileExistsError("the folder is taken")


@pytest.mark.parametrize("run", [on_main_process, on_every_process, main_process_first, failing_together_with])
def test_single_process_gets_its_result(run):
    assert run(lambda: {"a": [1]}) == {"a": [1]}


@pytest.mark.parametrize("run", [on_main_process, on_every_process, main_process_first, failing_together_with])
def test_single_process_gets_its_error_as_it_was_raised(run):
    with pytest.raises(FileExistsError, match="^the folder is taken$") as error:
        run(fail)
    assert error.traceback[-1].name == "fail"
    assert not hasattr(error.value, "__notes__")


def test_failure_of_a_later_call_is_not_raised_in_an_earlier_one(monkeypatch):
    """One process has come to the meeting, looks who else has, and is held up while the other comes, goes and fails."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    slow, fast = Peers(store, 1, 2), Peers(store, 0, 2)
    ask, looks = slow._ask, []

    def ask_and_be_held_up(method, key, *args, **kwargs):
        answer = ask(method, key, *args, **kwargs)
        if (method, key, args) == ("add", "arrived", (0,)):
            looks.append(answer)
            if len(looks) == 1:
                fast.meet()
                fast.announce(OSError("in the next call"), fast.era)
        return answer

    monkeypatch.setattr(slow, "_ask", ask_and_be_held_up)
    slow.meet()
    assert looks[:2] == [1, 2]
    with pytest.raises(OSError, match="in the next call"):
        slow.meet()


PREAMBLE = """
    import json, os, sys, time, traceback
    from datetime import timedelta
    from pathlib import Path
    import torch
    from accelerate import PartialState
    from spin_trl.processes import ranks
    from spin_trl.ranks import failing_together, main_process_first, on_every_process, on_main_process
    from spin_trl.ranks import raise_if_another_failed

    folder = Path(sys.argv[1])
    state = PartialState(cpu=True, timeout=timedelta(seconds=float(sys.argv[2])))
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
        except Exception as error:
            seen[name] = "".join(traceback.format_exception_only(error))
        seen[name + "_seconds"] = time.monotonic() - started
        (folder / str(rank)).write_text(json.dumps(seen))
"""


def start(folder: Path, script: str, group_timeout: float = 60) -> TwoProcesses:
    """Run a script, after `PREAMBLE`, in a process group whose collectives may take so many seconds."""
    (folder / "script.py").write_text(textwrap.dedent(PREAMBLE) + textwrap.dedent(script))
    return TwoProcesses(folder, str(folder / "script.py"), str(folder), str(group_timeout))


@pytest.fixture(scope="module")
def seen_by_two_processes(tmp_path_factory) -> list[dict]:
    """What each got or saw raised; the time limit of the process group is two seconds."""
    script = """
    attempt("main", on_main_process, lambda: [rank, "from main"])
    attempt("every", on_every_process, lambda: rank)
    attempt("main_fails", on_main_process, fail_on([0], FileExistsError))
    attempt("second_fails", on_every_process, fail_on([1], FileExistsError))
    attempt("both_fail", on_every_process, fail_on([0, 1], OSError))
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

    def work_while_the_other_fails():
        if rank == 1:
            raise ValueError("rank 1 failed")
        while True:
            raise_if_another_failed()
            time.sleep(0.01)

    attempt("long_work", on_every_process, work_while_the_other_fails)

    def step_fails():
        with failing_together():
            on_every_process(lambda: None)
            fail_on([1], ZeroDivisionError)()
            on_every_process(lambda: None)

    attempt("step_fails", step_fails)

    def fails_within():
        with failing_together():
            on_main_process(lambda: on_main_process_alone())

    def on_main_process_alone():
        raise KeyError("inner")

    attempt("fails_within", fails_within)

    def fails_again():
        try:
            on_main_process(fail_on([0], OSError))
        except OSError:
            with failing_together():  # while the first error is still being handled
                fail_on([1], ZeroDivisionError)()

    attempt("fails_again", fails_again)

    order = folder / "order"
    def take_turn():
        time.sleep(0.3 * (rank == 0))
        with order.open("a") as file:
            file.write(str(rank))
        return rank

    attempt("turn", main_process_first, take_turn)
    attempt("order", on_main_process, order.read_text)

    store = torch.distributed.distributed_c10d._get_default_store()
    num_keys = store.num_keys()
    for _ in range(20):
        on_every_process(lambda: None)
        attempt("ignored", on_main_process, fail_on([0], OSError))
    on_every_process(lambda: None)
    seen["new_keys"] = store.num_keys() - num_keys
    on_every_process(lambda: None)

    def slow():
        time.sleep(5 * (rank == 0))
        return "done"

    attempt("slow_main", on_main_process, slow)
    ranks.GRACE_PERIOD = 0.5
    def train():
        with failing_together():
            time.sleep(3 * (rank == 0))
            return "trained"

    attempt("slow_step", train)
    """
    folder = tmp_path_factory.mktemp("ranks")
    processes = start(folder, script, group_timeout=2)
    processes.wait()
    assert all((folder / str(rank)).exists() for rank in range(2)), processes.output()
    return [json.loads((folder / str(rank)).read_text()) for rank in range(2)]


def test_every_process_gets_the_main_ones_result_or_its_own(seen_by_two_processes):
    first, second = seen_by_two_processes
    assert first["count"] == second["count"] == 2
    assert first["main"] == second["main"] == [0, "from main"]
    assert (first["every"], second["every"]) == (0, 1)


def test_error_of_any_process_is_raised_on_all_with_where_it_came_from(seen_by_two_processes):
    first, second = seen_by_two_processes
    assert "FileExistsError: rank 0 failed\nOn process 0:\nTraceback" in second["main_fails"]
    assert "FileExistsError: rank 1 failed\nOn process 1:\nTraceback" in first["second_fails"]
    assert first["main_fails"] == "FileExistsError: rank 0 failed\nOn process 0\n"
    assert first["both_fail"][:22] == second["both_fail"][:22] != ""  # "OSError: rank 0 failed", or 1
    for seen in seen_by_two_processes:
        assert seen["main_after"] == "still in step"


def test_error_that_cannot_be_pickled_is_not_lost(seen_by_two_processes):
    first, second = seen_by_two_processes
    assert "rank 0 failed" in first["unpicklable"] and "rank 0 failed" in second["unpicklable"]
    assert "rank 1 failed" in first["unknown_class"] and "rank 1 failed" in second["unknown_class"]
    assert "an't pickle" in first["unpicklable_result"] or "not pickle" in first["unpicklable_result"]


def test_long_work_of_one_process_ends_when_another_fails(seen_by_two_processes):
    for seen in seen_by_two_processes:
        assert "ValueError: rank 1 failed" in seen["long_work"]


def test_error_between_the_meetings_is_raised_on_all(seen_by_two_processes):
    for seen in seen_by_two_processes:
        assert "ZeroDivisionError: rank 1 failed" in seen["step_fails"]
        assert "KeyError: 'inner'" in seen["fails_within"]


def test_error_is_shared_even_while_an_older_one_is_being_handled(seen_by_two_processes):
    for seen in seen_by_two_processes:
        assert "ZeroDivisionError: rank 1 failed" in seen["fails_again"]


def test_main_process_goes_first(seen_by_two_processes):
    assert [seen["turn"] for seen in seen_by_two_processes] == [0, 1]
    assert seen_by_two_processes[0]["order"] == "01"


def test_store_does_not_fill_up(seen_by_two_processes):
    for seen in seen_by_two_processes:
        assert seen["new_keys"] <= 10


def test_work_may_take_longer_than_the_time_limit_of_the_process_group(seen_by_two_processes):
    for seen in seen_by_two_processes:
        assert seen["slow_main"] == "done" and seen["slow_main_seconds"] > 4


def test_slow_process_is_not_taken_for_a_failed_one(seen_by_two_processes):
    for seen in seen_by_two_processes:
        assert seen["slow_step"] == "trained" and seen["slow_step_seconds"] > 2


STUCK = """
    ranks.GRACE_PERIOD = 2
    try:
        with failing_together():
            on_every_process(lambda: None)
            (folder / f"working-{rank}").touch()
            if rank == FAILING:
                HOW
            torch.distributed.all_reduce(torch.zeros(1))
    finally:
        time.sleep(8 * (rank == FAILING))  # its connections stay open, so nothing but the watcher ends the other one
"""


def test_process_that_waits_in_a_collective_for_a_failed_one_is_ended_with_its_error(tmp_path):
    script = STUCK.replace("FAILING", "1").replace("HOW", 'raise FloatingPointError("step 7")')
    processes = start(tmp_path, script)
    assert processes.wait() == [1, 1]
    assert "Process 1 has failed:\nTraceback" in processes.output(0)
    assert "FloatingPointError: step 7" in processes.output(0)
    assert "Process 0 waits for what will not come, so it is ended" in processes.output(0)


def test_process_that_waits_for_a_killed_main_process_ends(tmp_path):
    script = """
    with failing_together():
        on_every_process(lambda: None)
        (folder / f"working-{rank}").touch()
        on_main_process(lambda: time.sleep(100))
    """
    processes = start(tmp_path, script)
    processes.wait_for("working-0")
    processes.wait_for("working-1")
    processes.processes[0].kill()
    assert processes.wait() == [-9, 1]
    assert "process 0, or the launcher, is gone" in processes.output(1)


@pytest.mark.slow
def test_process_that_works_on_while_the_main_one_is_killed_ends(tmp_path):
    script = """
    ranks.GRACE_PERIOD = 2
    with failing_together():
        on_every_process(lambda: None)
        (folder / f"working-{rank}").touch()
        time.sleep(100)
    """
    processes = start(tmp_path, script)
    processes.wait_for("working-0")
    processes.wait_for("working-1")
    processes.processes[0].kill()
    assert processes.wait() == [-9, 1]
    assert "process 0, or the launcher, is gone" in processes.output(1)


@pytest.mark.slow
def test_keyboard_interrupt_of_one_process_ends_all(tmp_path):
    script = """
    ranks.GRACE_PERIOD = 2
    with failing_together():
        on_every_process(lambda: None)
        (folder / f"working-{rank}").touch()
        on_main_process(lambda: time.sleep(100))
    """
    processes = start(tmp_path, script)
    processes.wait_for("working-0")
    processes.wait_for("working-1")
    processes.processes[1].send_signal(signal.SIGINT)
    processes.processes[0].wait(timeout=PATIENCE)
    assert all(status != 0 for status in processes.wait())
    assert "Process 1 has failed" in processes.output(0) and "KeyboardInterrupt" in processes.output(0)
