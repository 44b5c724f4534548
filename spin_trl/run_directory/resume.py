"""How a run starts: anew, or from where an earlier one stood. Knows nothing of training.

A run goes on from its newest checkpoint that fits what is on disk. Every iteration ends in one, so the policy that a
stopped run's opponent was is always there. What lies behind the checkpoint is deleted: it was made by a policy that no
longer exists.
"""

import json
import logging
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..objectives.settings import needs_initial_answers
from ..spin_config import SPINConfig
from .checkpoints import PLACE_FILE, Place
from .description import differences, without_secrets
from .run_paths import RunDirectoryError
from .store import IterationStore
from .whole_files import remove, to_json


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunStart:
    """
    Where a run starts.

    Args:
        run_id (`str`): The run.
        is_resumed (`bool`): Whether it goes on with what is on disk.
        checkpoint (`Path`, *optional*): What to load. `None` for the initial model.
        iteration (`int`): Number of the iteration to play, or to go on with.
        first_step (`int`): Steps of the run before that iteration.
        num_steps (`int`): Steps of it that are done.
        epochs_trained (`int`): Epochs of the run that are done.
        steps_in_epoch (`int`): Steps of the next epoch that are done.
        is_trained (`bool`): Whether all training is done.
        is_finished (`bool`): Whether nothing at all is left to do.
        ended (`str`, *optional*): Why it was over before its last iteration, if it was, and how to play on.
        returned_to (`int`, *optional*): Whose opponent is its final policy, if not what the checkpoint holds.
    """

    run_id: str
    is_resumed: bool = False
    checkpoint: Path | None = None
    iteration: int = 0
    first_step: int = 0
    num_steps: int = 0
    epochs_trained: int = 0
    steps_in_epoch: int = 0
    is_trained: bool = False
    is_finished: bool = False
    ended: str | None = None
    returned_to: int | None = None

    @property
    def next_iteration(self) -> int:
        """Number of the iteration whose opponent the policy is, or is to become once `iteration` is trained."""
        return self.iteration + (self.is_trained and self.num_steps > 0)

    def __str__(self) -> str:
        source = "the initial model" if self.checkpoint is None else self.checkpoint.name
        if self.returned_to is not None:
            source = f"the opponent of iteration {self.returned_to}"
        if self.ended is not None:
            return f"The run in `output_dir` is complete; its final policy is {source}. {self.ended}"
        if self.is_finished:
            return (
                f"The run in `output_dir` is complete; its final policy is {source}. To play it again, set "
                "`overwrite_output_dir=True`; to play on, raise `num_iterations`."
            )
        if self.is_trained:
            return f"The run in `output_dir` goes on from {source}: all training is done."
        return (
            f"The run in `output_dir` goes on from {source}: iteration {self.iteration}, after {self.num_steps} of its "
            "steps."
        )


def start_run(
    store: IterationStore,
    args: SPINConfig,
    description: dict[str, Any],
    requested: str | bool | None,
) -> RunStart:
    """
    Make the run directory this run's. Called on the main process alone, which holds the directory's lock.

    Args:
        store ([`IterationStore`]): The run directory.
        args ([`SPINConfig`]): `resume` and `overwrite_output_dir` say what to do with a run that lies there.
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
    run_id = os.urandom(4).hex()
    store.write_run({**description, "run": run_id, "starts": [_now("the initial model")]})
    return RunStart(run_id)


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
    run_id = stored["run"]
    checkpoint = _requested_checkpoint(store, requested) or _newest_checkpoint(store, run_id)
    start = _start_at(store, args, run_id, checkpoint)
    if checkpoint is not None and (ended := _end_of(stored, args, start)):
        return replace(start, is_trained=True, is_finished=True, **ended)
    if start.is_trained and stored.get("finished") and not _plays_on(stored, description):
        return replace(start, is_finished=True)
    was_trained = (stored.get("converged") or {}).get("iteration") != 0
    if checkpoint is None and stored.get("finished") and was_trained:
        raise RunDirectoryError(
            f"The run in `output_dir` ({args.output_dir}) is complete, but left no checkpoint to load its policy from. "
            "Set `overwrite_output_dir=True` to play it again, or choose another `output_dir`."
        )
    store.clear_temporary()
    later = [iteration for iteration in store.iterations() if iteration > start.iteration]
    if later:
        logger.warning(f"Iterations {later} are deleted and played again: no checkpoint holds the policy they are of.")
    store.forget_from(start.iteration + 1)
    store.forget_checkpoints_after(start.first_step + start.num_steps)
    if start.num_steps == 0 and store.has_pairs(start.iteration) and not store.has_whole_pairs(start.iteration):
        logger.warning(f"The pairs of iteration {start.iteration} are damaged, and made again.")
        remove(store.path(start.iteration, "pairs"))
    _require_history(store, args, start)
    if needs_initial_answers(args.loss_type, vars(args)) and store.has_pairs(0) and not start.is_trained:
        IterationStore(store.output_dir, run_id).initial_answers.restore(
            stored["data"]["num_train_rows"] * args.num_generations
        )
    starts = [*stored.get("starts", []), _now("the initial model" if checkpoint is None else checkpoint.name)]
    store.write_run({**description, "run": run_id, "starts": starts})
    return start


def _end_of(stored: dict[str, Any], args: SPINConfig, start: RunStart) -> dict[str, Any] | None:
    """How a run that was over early ended, if it is to stay so and the checkpoint is what it ended with."""
    rules = (
        ("converged", args.stop_when_converged, "stop_when_converged=False"),
        ("collapsed", args.on_collapse != "warn", "on_collapse='warn'"),
    )
    for kind, is_on, to_play_on in rules:
        end = stored.get(kind)
        if end and is_on and start.iteration == end["iteration"] and start.num_steps == 0:
            ended = f"{end['message']} To play on all the same, set `{to_play_on}`."
            return {"ended": ended, "returned_to": end.get("returned_to")}
    return None


def _plays_on(stored: dict[str, Any], description: dict[str, Any]) -> bool:
    return stored["config"]["num_iterations"] < description["config"]["num_iterations"]


def _requested_checkpoint(store: IterationStore, requested: str | bool | None) -> Path | None:
    if not isinstance(requested, str):
        return None
    checkpoint = Path(requested).absolute()
    if checkpoint.parent.resolve() != store.output_dir.resolve():
        raise RunDirectoryError(
            f"`resume_from_checkpoint` ({requested}) does not lie in `output_dir` ({store.output_dir}), where the rest "
            "of its run would be. Set `output_dir` to the folder that holds the checkpoint."
        )
    problem = _problem_of(store, checkpoint, store.read_run()["run"])
    if problem is not None:
        raise RunDirectoryError(
            f"`resume_from_checkpoint` ({requested}) cannot be resumed from: it {problem}. Use another checkpoint, or "
            "`True` for the newest one that fits."
        )
    return checkpoint


def _newest_checkpoint(store: IterationStore, run_id: str) -> Path | None:
    for checkpoint in store.checkpoints():
        problem = _problem_of(store, checkpoint, run_id)
        if problem is None:
            return checkpoint
        logger.warning(f"{checkpoint} is not resumed from: it {problem}.")
    return None


def _problem_of(store: IterationStore, checkpoint: Path, run_id: str) -> str | None:
    """Why a run cannot go on from a checkpoint, if it cannot."""
    try:
        place = Place.read(checkpoint)
    except (OSError, ValueError, TypeError) as error:
        return f"holds no {PLACE_FILE} that says its place in the run ({type(error).__name__}: {error})"
    if place.run_id != run_id:
        return f"is of another run ({place.run_id!r}, not {run_id!r})"
    if place.pairs != store.pairs_checksum(place.iteration):
        return f"was trained on other pairs than those that now lie in iteration-{place.iteration}"
    if not place.is_iteration_done:
        if not place.holds_optimizer:
            return "lies within an iteration and holds no optimizer state (`save_only_model=True`)"
        if not store.has_whole_pairs(place.iteration):
            return f"lies within iteration {place.iteration}, whose pairs are damaged"
    return None


def _start_at(store: IterationStore, args: SPINConfig, run_id: str, checkpoint: Path | None) -> RunStart:
    if checkpoint is None:
        return RunStart(run_id, is_resumed=True)
    place = Place.read(checkpoint)
    is_trained = 0 < args.max_steps <= place.step
    if place.is_iteration_done:
        iteration = place.iteration + 1
        return RunStart(
            run_id,
            is_resumed=True,
            checkpoint=checkpoint,
            iteration=iteration,
            first_step=place.step,
            epochs_trained=iteration * place.num_epochs,
            is_trained=is_trained or iteration >= args.num_iterations,
        )
    num_epochs, steps_in_epoch = divmod(place.num_steps, place.steps_per_epoch)
    return RunStart(
        run_id,
        is_resumed=True,
        checkpoint=checkpoint,
        iteration=place.iteration,
        first_step=place.first_step,
        num_steps=place.num_steps,
        epochs_trained=place.iteration * place.num_epochs + num_epochs,
        steps_in_epoch=steps_in_epoch,
        is_trained=is_trained,
    )


def _require_history(store: IterationStore, args: SPINConfig, start: RunStart) -> None:
    """Pairs of earlier iterations cannot be made again: their opponents' policies are gone."""
    if start.is_trained or store.has_pairs(start.iteration):
        return
    for iteration in range(max(0, start.iteration - args.num_history_iterations), start.iteration):
        if not store.has_whole_pairs(iteration):
            raise RunDirectoryError(
                f"{store.path(iteration, 'pairs')} is damaged or missing, but `num_history_iterations` "
                f"({args.num_history_iterations}) mixes it into iteration {start.iteration}. Resume from a checkpoint "
                f"of iteration {iteration} or earlier, or play the run again with `overwrite_output_dir=True`."
            )


def _now(source: str) -> dict[str, str]:
    return {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "from": source}
