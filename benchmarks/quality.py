"""The self-play family compared: which method reaches what, from one SFT model, with equal budgets.

    make bench-quality [ARGS="--tasks pronunciation --methods spin sft --seeds 1 2 3"]

For each task and method six settings are searched on a validation part with one seed; the best is run over the seeds
and measured on the test part. Every run has a process of its own, and two go at once. Its result is kept under
`runs/benchmarks/quality/`, so that a benchmark that was stopped goes on. The whole writes `benchmarks/quality.md` and
its picture, a part of it `runs/benchmarks/quality/quality.md`, from all results there are; the paragraph at its top is
written by hand and kept. About 75 minutes on two CPU cores.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import date
from typing import Any

from measure import ROOT, fresh_processes, machine, parse, parser
from self_play_family.findings import chosen_runs, collect, search_runs, start_runs
from self_play_family.methods import METHODS
from self_play_family.report import write_report
from self_play_family.runs import Run, make_start, perform
from self_play_family.tasks import TASKS, get_task


SEEDS = [1, 2, 3]


def main() -> None:
    options = parse_arguments()
    quick = options.quick
    # One core for each run.
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    root = options.output / "quality"
    tasks = [get_task(name, quick) for name in options.tasks]
    both = [(task, METHODS[method]) for task in tasks for method in options.methods]
    with fresh_processes("self_play_family.runs", options.processes) as pool:
        do_all(pool, make_start, [(root, t.name, quick) for t in tasks], "{} has its start".format)
        finish(pool, [run for t in tasks for run in start_runs(root, t.name, quick)])
        finish(pool, [run for t, m in both for run in search_runs(root, t, m, quick)])
        finish(pool, [run for t, m in both for run in chosen_runs(root, t, m, options.seeds, quick)])
    path = (ROOT / "benchmarks" if is_whole(options) else root) / "quality.md"
    write_report(collect(root, options.seeds, quick), options.seeds, path, f"{date.today()}, {machine()}")
    print(f"Written to {path}")


def is_whole(options: argparse.Namespace) -> bool:
    """Whether this is the whole comparison, whose report belongs with the code."""
    return not options.quick and (options.tasks, options.methods, options.seeds) == (list(TASKS), list(METHODS), SEEDS)


def do_all(
    pool: ProcessPoolExecutor, function: Callable, jobs: Sequence[tuple], describe: Callable[[Any], str]
) -> None:
    """
    Call `function` with each of the jobs, and print what `describe` says of what it returns.

    Raises:
        The first error of a job, when those that have begun are over.
    """
    futures = [pool.submit(function, *job) for job in jobs]
    try:
        for number, future in enumerate(as_completed(futures), 1):
            print(f"{number}/{len(futures)} {describe(future.result())}", flush=True)
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise


def finish(pool: ProcessPoolExecutor, runs: Sequence[Run]) -> None:
    """Do those that have no result yet."""
    do_all(pool, perform, [(run,) for run in runs if run.result() is None], describe)


def describe(run: Run) -> str:
    result = run.result()
    scores = " ".join(f"{scores['score']:.3f}" for scores in result["scores"] or []) or result["error"]
    return f"{run.task} {run.path.stem}: {scores} ({result['seconds']:.0f} s)"


def parse_arguments() -> argparse.Namespace:
    arguments = parser(__doc__)
    arguments.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    arguments.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    processes = min(2, os.cpu_count() or 1)
    arguments.add_argument("--processes", type=int, default=processes, help="runs at a time, one core each")
    options = parse(arguments)
    if options.quick:
        options.seeds = options.seeds[:1]
    return options


if __name__ == "__main__":
    main()
