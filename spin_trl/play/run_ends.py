"""How a run begins, whom it opens, and how it ends, beside its iterations. Knows nothing of training."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from accelerate import PartialState
from tqdm import tqdm

from ..evaluation.best_iteration import find_best
from ..processes.ranks import on_main_process
from ..run_directory.resume import start_run
from ..run_directory.run import RunStart
from ..run_directory.store import IterationStore
from ..run_directory.whole_files import write_whole
from .game import Game
from .plan import Plan


def begin_run(plan: Plan, store: IterationStore, requested: str | bool | None) -> RunStart:
    """
    Make the run directory this run's, with its data. Called on the main process alone, which holds the lock.

    Args:
        requested (`str` or `bool`, *optional*): `True` to resume, or a checkpoint to resume from.

    Raises:
        As [`start_run`].
    """
    if isinstance(requested, str):  # the command line gives booleans as text
        requested = {"true": True, "false": None}.get(requested.lower(), requested)
    start = start_run(store, plan.args, plan.describe(), requested or None)
    if start.is_resumed:
        tqdm.write(str(start))
    store.write_invalid_rows(plan.data.invalid_rows)
    if not start.is_resumed or not store.has_whole_data(plan.data.preferences is not None):
        store.write_data(plan.data.train, plan.data.preferences)
    return start


@contextmanager
def open_sampler(game: Game) -> Iterator[None]:
    """Start what is to answer, and end it in the end. Every process enters it."""
    plan, turns, sampler, host = game.plan, game.turns, game.sampler, game.plan.sampler_host
    with ExitStack() as stack:
        stack.callback(turns.end)  # when the server is gone
        stack.callback(host.close, sampler)
        if (folder := host.served_base) is not None:
            on_main_process(lambda: write_whole(folder, game.policy.save_base))
        turns.give_to_server()  # it takes its memory when it starts
        host.open(sampler, plan.data.prompt_length(0) + 1, plan.longest_sequence, game.policy.precision)
        turns.begin(host.rest(sampler))
        turns.give_to_policy(briefly=True)
        yield


def finish_run(game: Game) -> None:
    """
    Say which iteration is the best, make the policy what it is to be, mark the run as finished, and merge the adapter
    if that is asked for. Every process calls it.

    Raises:
        [`RunDirectoryError`]: if a policy to return to is not on disk.
    """
    args, run, store, outcome = game.args, game.run, game.store, {}
    if args.metric_for_best_model is not None:
        best = on_main_process(lambda: find_best(store.all_metrics(), args))
        PartialState().print(str(best) if best else f"No evaluation has a value of `{args.metric_for_best_model}`.")
        if best is not None:
            outcome["best_iteration"] = best.describe()
            if args.load_best_model_at_end:
                game.opponents.take_back(best.opponent)
    if run.end is not None:
        outcome[run.end.kind] = run.end.describe()
    if run.returned_to is not None and not args.load_best_model_at_end:
        game.opponents.take_back(run.returned_to)
    on_main_process(lambda: store.write_run({**store.read_run(), **outcome, "finished": True}))
    merged = store.output_dir / "merged"
    is_there = on_main_process(lambda: run.start.is_finished and merged.is_dir())
    if args.merge_adapter_at_end and not is_there:
        game.policy.save_merged(game.plan.model_name, merged)
