"""Two runs at a time, each in a process of its own on one core. Knows nothing of what they do."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def process_pool(num_processes: int):
    """
    A pool of processes that is new for each task, forked from one that has imported everything: importing alone takes
    longer than some runs.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["self_play_family.runs"])
    with ProcessPoolExecutor(num_processes, mp_context=context, max_tasks_per_child=1) as pool:
        yield pool


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
