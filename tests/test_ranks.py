"""Work of one or all processes: results, and errors that every process sees."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from spin_trl.ranks import on_every_process, on_main_process


def fail():
    raise FileExistsError("the folder is taken")


@pytest.mark.parametrize("run", [on_main_process, on_every_process])
def test_single_process_gets_its_result(run):
    assert run(lambda: {"a": [1]}) == {"a": [1]}


@pytest.mark.parametrize("run", [on_main_process, on_every_process])
def test_single_process_gets_its_error_as_it_was_raised(run):
    with pytest.raises(FileExistsError, match="^the folder is taken$") as error:
        run(fail)
    assert error.traceback[-1].name == "fail"
    assert not hasattr(error.value, "__notes__")


SCRIPT = """
    import json, os, sys, traceback
    from accelerate import PartialState
    from spin_trl.ranks import on_every_process, on_main_process

    state = PartialState(cpu=True)
    rank, seen = state.process_index, {"count": state.num_processes}

    def fail_on(ranks, kind):
        def work():
            if rank in ranks:
                raise kind(f"rank {rank} failed")
            return rank
        return work

    def attempt(name, run, work):
        try:
            seen[name] = run(work)
        except Exception as error:
            seen[name] = "".join(traceback.format_exception_only(error))
        with open(os.path.join(sys.argv[1], str(rank)), "w") as file:
            json.dump(seen, file)

    attempt("main", on_main_process, lambda: [rank, "from main"])
    attempt("every", on_every_process, lambda: rank)
    attempt("main_fails", on_main_process, fail_on([0], FileExistsError))
    attempt("second_fails", on_every_process, fail_on([1], FileExistsError))
    attempt("both_fail", on_every_process, fail_on([0, 1], OSError))
    attempt("main_after", on_main_process, lambda: "still in step")

    def unpicklable(message):
        return type("Local", (Exception,), {})(message)

    attempt("unpicklable", on_main_process, fail_on([0], unpicklable))
"""


@pytest.fixture(scope="module")
def seen_by_two_processes(tmp_path_factory) -> list[dict]:
    """What each of two processes of `SCRIPT` got or saw raised."""
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command += [str(script), str(folder)]
    run = subprocess.run(command, env=environment, timeout=60, capture_output=True, text=True)
    assert (folder / "0").exists() and (folder / "1").exists(), run.stderr
    return [json.loads((folder / str(rank)).read_text()) for rank in range(2)]


def test_every_process_gets_the_main_ones_result_or_its_own(seen_by_two_processes):
    first, second = seen_by_two_processes
    assert first["count"] == second["count"] == 2
    assert first["main"] == second["main"] == [0, "from main"]
    assert (first["every"], second["every"]) == (0, 1)


def test_error_of_any_process_is_raised_on_all_with_where_it_came_from(seen_by_two_processes):
    for seen in seen_by_two_processes:
        assert "FileExistsError: rank 0 failed\nOn process 0:\nTraceback" in seen["main_fails"]
        assert "FileExistsError: rank 1 failed\nOn process 1:\nTraceback" in seen["second_fails"]
        assert "OSError: rank 0 failed" in seen["both_fail"]
        assert seen["main_after"] == "still in step"


def test_error_that_cannot_be_pickled_is_not_lost(seen_by_two_processes):
    for seen in seen_by_two_processes:
        assert "rank 0 failed" in seen["unpicklable"]
