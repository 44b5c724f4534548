"""How a run begins and how it ends, beside its iterations. Knows nothing of training."""

from accelerate import PartialState
from tqdm import tqdm

from ..evaluation.best_iteration import find_best
from ..processes.ranks import on_main_process
from ..run_directory.resume import RunStart, start_run
from ..run_directory.run import Run
from ..run_directory.store import IterationStore
from ..spin_config import SPINConfig
from .opponents import Opponents
from .setup import SelfPlaySetup


def begin_run(plan: SelfPlaySetup, store: IterationStore, requested: str | bool | None) -> RunStart:
    """
    Make the run directory this run's, with its data. Called on the main process alone, which holds the lock.

    Args:
        requested (`str` or `bool`, *optional*): `True` to resume, or a checkpoint to resume from.

    Raises:
        As [`start_run`].
    """
    start = start_run(store, plan.args, plan.describe(), requested)
    if start.is_resumed:
        tqdm.write(str(start))
    store.write_invalid_rows(plan.invalid_rows)
    store.run_id = start.run_id
    if not start.is_resumed or not store.has_whole_data(plan.preferences is not None):
        store.write_data(plan.train_dataset)
        if plan.preferences is not None:
            store.write_preferences(plan.preferences)
    return start


def finish_run(run: Run, args: SPINConfig, store: IterationStore, opponents: Opponents) -> None:
    """
    Say which iteration is the best, make the policy what it is to be, and mark the run as finished. Every process
    calls it.

    Raises:
        [`RunDirectoryError`]: if a policy to return to is not on disk.
    """
    outcome = {}
    if args.metric_for_best_iteration is not None:
        best = on_main_process(lambda: find_best(store.all_metrics(), args))
        PartialState().print(str(best) if best else f"No evaluation has a value of `{args.metric_for_best_iteration}`.")
        if best is not None:
            outcome["best_iteration"] = best.describe()
            if args.load_best_iteration_at_end:
                opponents.take_back(best.opponent)
    if run.end is not None:
        outcome[run.end.kind] = run.end.describe()
    if run.returned_to is not None and not args.load_best_iteration_at_end:
        opponents.take_back(run.returned_to)
    on_main_process(lambda: store.mark_finished(**outcome))
