"""The self-play family compared: which method reaches what, from one SFT model, with equal budgets.

    python benchmarks/quality.py [--tasks pronunciation] [--methods spin sft] [--seeds 1 2 3] [--quick]

For each task and method six settings are searched on a validation part with one seed; the best is run over the seeds
and measured on the test part. Every run has a process of its own, and two go at once. Its result is kept under
`runs/benchmarks/quality/`, so that a benchmark that was stopped goes on. The whole writes `benchmarks/quality.md` and
its picture, a part of it `runs/benchmarks/quality/quality.md`, from all results there are; the paragraph at its top is
written by hand and kept.

About 75 minutes on two CPU cores. `--quick` plays everything on a handful of rows, for a look at whether it runs.
"""

import argparse
import os
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from measure import RESULTS, ROOT, machine
from self_play_family.findings import chosen_runs, collect, search_runs, start_runs
from self_play_family.methods import METHODS, known_methods
from self_play_family.pool import do_all, process_pool
from self_play_family.report import write_report
from self_play_family.runs import Run, make_start, perform
from self_play_family.tasks import TASKS, get_task


SEEDS = [1, 2, 3]


def main() -> None:
    options = parse()
    os.environ["HF_HUB_OFFLINE"] = "1"
    root = RESULTS / ("quality-quick" if options.quick else "quality")
    tasks = [get_task(name, options.quick) for name in options.tasks]
    methods = known_methods(options.methods)
    if not methods:
        raise SystemExit("There is no method left to compare.")
    with process_pool(options.processes) as pool:
        do_all(pool, make_start, [(root, t.name, options.quick) for t in tasks], "{} has its start".format)
        finish(pool, [run for t in tasks for run in start_runs(root, t.name, options.quick)])
        finish(pool, [run for t in tasks for m in methods for run in search_runs(root, t, m, options.quick)])
        finish(
            pool, [run for t in tasks for m in methods for run in chosen_runs(root, t, m, options.seeds, options.quick)]
        )
    output = options.output or (ROOT / "benchmarks" / "quality.md" if is_whole(options) else root / "quality.md")
    write_report(collect(root, options.seeds, options.quick), options.seeds, output, f"{date.today()}, {machine()}")
    print(f"Written to {output}")


def is_whole(options: argparse.Namespace) -> bool:
    """Whether this is the whole comparison, whose report belongs with the code."""
    return not options.quick and (options.tasks, options.methods, options.seeds) == (list(TASKS), list(METHODS), SEEDS)


def finish(pool, runs: Sequence[Run]) -> None:
    """Do those that have no result yet."""
    do_all(pool, perform, [(run,) for run in runs if run.result() is None], describe)


def describe(run: Run) -> str:
    result = run.result()
    scores = " ".join(f"{scores['score']:.3f}" for scores in result["scores"] or []) or result["error"]
    return f"{run.task} {run.path.stem}: {scores} ({result['seconds']:.0f} s)"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument(
        "--processes", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time, one core each"
    )
    parser.add_argument(
        "--output", type=Path, help="by default benchmarks/quality.md, or, of a part, beside the results"
    )
    parser.add_argument("--quick", action="store_true", help="little data: to see that everything runs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
