"""How a run starts: anew, or from where an earlier one stood. Knows nothing of training.

A run goes on from its newest checkpoint that fits what is on disk. Every iteration ends in one, so the policy that a
stopped run's opponent was is always there. What lies behind the checkpoint is deleted: it was made by a policy that no
longer exists.
"""

import json
import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..objectives.settings import needs_initial_answers
from ..spin_config import SPINConfig
from .checkpoints import PLACE_FILE, Place
from .description import differences, without_secrets
from .run import RunStart
from .run_paths import RunDirectoryError
from .store import IterationStore
from .whole_files import remove, to_json


logger = logging.getLogger(__name__)


def start_run(
    store: IterationStore, args: SPINConfig, description: dict[str, Any], requested: str | bool | None
) -> RunStart:
    """
    Make the run directory this run's. Called on the main process alone, which holds the directory's lock.

    Args:
        description (`dict[str, Any]`): What this run depends on.
        requested (`str` or `bool`, *optional*): `True` to resume, or a checkpoint to resume from.

    Raises:
        `FileExistsError`: if a run lies there that is neither to be resumed nor to be overwritten.
        [`RunDirectoryError`]: if it cannot be resumed.
    """
    if requested and args.overwrite_output_dir:
        raise ValueError(
            f"`resume_from_checkpoint={requested!r}` contradicts `overwrite_output_dir=True`, which deletes the run "
            "that it would resume. Set only one of the two."
        )
    exists = store.has_run() or bool(store.iterations())
    if exists and not args.overwrite_output_dir:
        if not requested and args.resume != "auto":
            raise FileExistsError(
                f"`output_dir` ({args.output_dir}) already holds a self-play run with iterations "
                f"{store.iterations()}. To continue it, set `resume='auto'` or call "
                "`train(resume_from_checkpoint=True)`; to delete it, set `overwrite_output_dir=True`; to keep it, "
                "choose another `output_dir`."
            )
        return _resume(store, args, description, requested)
    if requested:
        raise RunDirectoryError(
            f"There is no run to resume in `output_dir` ({args.output_dir}). Correct `output_dir`, or start the run "
            "without `resume_from_checkpoint`; `resume='auto'` resumes only where there is something."
        )
    if exists:
        store.clear()
    store.clear_temporary()
    store.run_id = os.urandom(4).hex()
    store.write_run({**description, "run": store.run_id, "starts": [_now("the initial model")]})
    return RunStart(Place(store.run_id))


def check_same_run(store: IterationStore, description: dict[str, Any]) -> None:
    """
    Raises:
        [`RunDirectoryError`]: if the run that lies there is of another configuration or other data.
    """
    if not store.has_run():
        raise RunDirectoryError(
            f"{store.output_dir} holds iterations {store.iterations()}, but no self_play.json that says which run they "
            "are of. Choose another `output_dir`, or set `overwrite_output_dir=True` to delete them."
        )
    different = differences(store.read_run(), json.loads(to_json(without_secrets(description))))
    if different:
        listed = "\n".join(f"  {line}" for line in different)
        raise RunDirectoryError(
            f"`output_dir` ({store.output_dir}) holds a run of another configuration or other data. Different are:\n"
            f"{listed}\nTo continue that run, give the values from there; to keep it, choose another `output_dir`; to "
            "delete it, set `overwrite_output_dir=True`."
        )


def _resume(
    store: IterationStore, args: SPINConfig, description: dict[str, Any], requested: str | bool | None
) -> RunStart:
    check_same_run(store, description)
    stored = store.read_run()
    store.run_id = stored["run"]
    start = _find_start(store, args, requested)
    if ended := _ended(stored, args, start):
        return ended
    was_trained = (stored.get("converged") or {}).get("iteration") != 0
    if start.checkpoint is None and stored.get("finished") and was_trained:
        raise RunDirectoryError(
            f"The run in `output_dir` ({args.output_dir}) is complete, but left no checkpoint to load its policy from. "
            "Set `overwrite_output_dir=True` to play it again, or choose another `output_dir`."
        )
    store.clear_temporary()
    later = [iteration for iteration in store.iterations() if iteration > start.iteration]
    if later:
        logger.warning(f"Iterations {later} are deleted and played again: no checkpoint holds the policy they are of.")
    store.forget_after(start.iteration, start.place.step)
    pairs = store.pairs(start.iteration)
    if start.num_steps == 0 and pairs.exists and not pairs.is_whole():
        logger.warning(f"The pairs of iteration {start.iteration} are damaged, and made again.")
        remove(pairs.path)
    _require_history(store, args, start)
    if needs_initial_answers(args.loss_type, vars(args)) and store.has_pairs(0) and not start.is_trained:
        store.initial_answers.restore(stored["data"]["num_train_rows"])
    starts = [*stored.get("starts", []), _now(start.checkpoint.name if start.checkpoint else "the initial model")]
    store.write_run({**description, "run": store.run_id, "starts": starts})
    return start


def _ended(stored: dict[str, Any], args: SPINConfig, start: RunStart) -> RunStart | None:
    """A start at which nothing is left to do, if that is so and the checkpoint is what the run ended with."""
    rules = (
        ("converged", args.stop_when_converged, "stop_when_converged=False"),
        ("collapsed", args.on_collapse != "warn", "on_collapse='warn'"),
    )
    for kind, is_on, to_play_on in rules:
        end = stored.get(kind)
        is_there = end and start.checkpoint is not None and start.iteration == end["iteration"]
        if is_there and is_on and start.num_steps == 0:
            ended = f"{end['message']} To play on all the same, set `{to_play_on}`."
            return replace(start, is_trained=True, ended=ended, returned_to=end.get("returned_to"))
    if start.is_trained and stored.get("finished") and stored["config"]["num_iterations"] >= args.num_iterations:
        ended = "To play it again, set `overwrite_output_dir=True`; to play on, raise `num_iterations`."
        return replace(start, is_trained=True, ended=ended)
    return None


def _find_start(store: IterationStore, args: SPINConfig, requested: str | bool | None) -> RunStart:
    """At the checkpoint that is asked for, or the newest that fits; else at the initial model."""
    asked_for = [Path(requested).absolute()] if isinstance(requested, str) else []
    for checkpoint in asked_for or store.checkpoints():
        problem = _problem_of(store, checkpoint)
        if problem is None:
            start = RunStart(Place.read(checkpoint), is_resumed=True, checkpoint=checkpoint)
            is_capped = 0 < args.max_steps <= start.place.step
            return replace(start, is_trained=is_capped or start.iteration >= args.num_iterations)
        if asked_for:
            raise RunDirectoryError(
                f"`resume_from_checkpoint` ({requested}) cannot be resumed from: it {problem}. Use another checkpoint, "
                "or `True` for the newest one that fits."
            )
        logger.warning(f"{checkpoint} is not resumed from: it {problem}.")
    return RunStart(Place(store.run_id), is_resumed=True)


def _problem_of(store: IterationStore, checkpoint: Path) -> str | None:
    """Why a run cannot go on from a checkpoint, if it cannot."""
    if checkpoint.parent.resolve() != store.output_dir.resolve():
        return f"does not lie in `output_dir` ({store.output_dir}), where the rest of its run would be"
    try:
        place = Place.read(checkpoint)
    except (OSError, ValueError, TypeError) as error:
        return f"holds no {PLACE_FILE} that says its place in the run ({type(error).__name__}: {error})"
    pairs = store.pairs(place.iteration)
    if place.run_id != store.run_id:
        return f"is of another run ({place.run_id!r}, not {store.run_id!r})"
    if place.pairs != pairs.checksum():
        return f"was trained on other pairs than those that now lie in iteration-{place.iteration}"
    if not place.is_iteration_done and not place.holds_optimizer:
        return "lies within an iteration and holds no optimizer state (`save_only_model=True`)"
    if not place.is_iteration_done and not pairs.is_whole():
        return f"lies within iteration {place.iteration}, whose pairs are damaged"
    return None


def _require_history(store: IterationStore, args: SPINConfig, start: RunStart) -> None:
    """Pairs of earlier iterations cannot be made again: their opponents' policies are gone."""
    if start.is_trained or store.has_pairs(start.iteration):
        return
    for iteration in range(max(0, start.iteration - args.num_history_iterations), start.iteration):
        if not store.pairs(iteration).is_whole():
            raise RunDirectoryError(
                f"{store.pairs(iteration).path} is damaged or missing, but `num_history_iterations` "
                f"({args.num_history_iterations}) mixes it into iteration {start.iteration}. Resume from a checkpoint "
                f"of iteration {iteration} or earlier, or play the run again with `overwrite_output_dir=True`."
            )


def _now(source: str) -> dict[str, str]:
    return {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "from": source}
