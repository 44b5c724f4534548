"""What of a run goes to the hub: each iteration's result as a revision, the newest one on the main revision.

Only files that make a model are ever pushed. The main process works here alone; knows nothing of training.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import hf_api

from ..run_directory.resume import Place
from ..run_directory.store import IterationStore, to_json
from ..run_directory.whole_files import remove, write_directory, write_text
from ..spin_config import SPINConfig


logger = logging.getLogger(__name__)

_RECORD = "pushed.json"
_KEPT = "unpushed"
_MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "adapter_config.json",
    "added_tokens.json",
    "additional_chat_templates/*.jinja",
    "chat_template.*",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "*processor_config.json",
    "special_tokens_map.json",
    "tokenizer*",
    "vocab.*",
)


def push(
    folder: Path, card: str, repo_id: str, revision: str | None, message: str, token: str | None = None
) -> CommitInfo:
    """
    Push the model that lies in a folder, in one commit. Where it is there already, no commit is made.

    Args:
        folder (`Path`): Holds the model; whatever else lies in it stays.
        card (`str`): The model card, in place of any in the folder.
        repo_id (`str`): Where to.
        revision (`str`, *optional*): Branch; made where there is none. By default the main one.

    Raises:
        `FileNotFoundError`: if the folder holds no model.
        Whatever `huggingface_hub` raises.
    """
    names = model_files(folder)
    if not any(name.endswith(".safetensors") for name in names):
        raise FileNotFoundError(f"{folder} holds no model: there is no safetensors file among {names}")
    if revision not in (None, "main"):
        hf_api().create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    operations = [CommitOperationAdd(name, str(folder / name)) for name in names]
    operations.append(CommitOperationAdd("README.md", card.encode()))
    return hf_api().create_commit(repo_id, operations, commit_message=message, revision=revision, token=token)


def model_files(folder: Path) -> list[str]:
    """Names of the files in a folder that make a model: weights, configuration and tokenizer."""
    files = [*folder.glob("*"), *folder.glob("additional_chat_templates/*")]
    names = [path.relative_to(folder).as_posix() for path in files if path.is_file()]
    return sorted(name for name in names if any(_matches(name, pattern) for pattern in _MODEL_FILES))


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


class IterationPusher:
    """
    Pushes what iterations made, and knows from the run directory what is still missing on the hub.

    A push that fails is a warning. The model is then kept in `unpushed/`, to be pushed when the next iteration begins,
    when the run is resumed, or by hand.

    Args:
        store ([`IterationStore`]): The run directory.
        args ([`SPINConfig`]): `hub_iteration_revisions`, `hub_strategy`, `hub_revision` and `hub_token`.
        repo_id (`str`): The repository.
        make_card (`Callable[[int], str]`): Gives the model card of what an iteration made.
    """

    def __init__(self, store: IterationStore, args: SPINConfig, repo_id: str, make_card: Callable[[int], str]):
        self.store = store
        self.args = args
        self.repo_id = repo_id
        self.make_card = make_card

    def forget_from(self, iteration: int) -> None:
        """Iterations from this one on are played again: what was pushed of them is out of date."""
        for number in self.store.iterations():
            if number >= iteration:
                remove(self.store.path(number, _RECORD))
        for number in range(iteration, self.args.num_iterations):
            remove(self._kept(number))

    def push_results(self, num_iterations: int, is_end: bool = False) -> None:
        """
        Push what is missing of the results of the first `num_iterations` iterations.

        Args:
            is_end (`bool`): Whether the run is over, so that the last one's result is the newest checkpoint.
        """
        for iteration, revision in self._wanted(num_iterations, is_end):
            if revision in self._pushed(iteration):
                continue
            source = self._source(iteration, is_end and iteration == num_iterations - 1)
            if source is None:
                logger.warning(
                    f"The model that iteration {iteration} made is not pushed to {self.repo_id}, revision "
                    f"{revision!r}: no checkpoint holds it."
                )
            else:
                self._push(iteration, revision, source)

    def _wanted(self, num_iterations: int, is_end: bool) -> Iterator[tuple[int, str]]:
        if self.args.hub_iteration_revisions:
            yield from ((iteration, f"iteration-{iteration}") for iteration in range(num_iterations))
        if num_iterations > 0 and (is_end or self.args.hub_strategy != HubStrategy.END):
            yield num_iterations - 1, self.args.hub_revision or "main"

    def _push(self, iteration: int, revision: str, source: Path) -> None:
        card = self.make_card(iteration)
        message = f"SPIN, iteration {iteration}"
        try:
            commit = push(source, card, self.repo_id, revision, message, self.args.hub_token)
        except Exception as error:  # of whatever kind: training is worth more than its copy on the hub
            kept = self._keep(iteration, source, card)
            logger.warning(
                f"The model that iteration {iteration} made could not be pushed to {self.repo_id}, revision "
                f"{revision!r}: {type(error).__name__}: {error}\nTraining goes on. The model is kept in {kept}; it is "
                "pushed again when the next iteration begins and when the run is resumed. By hand: "
                f"`hf upload {self.repo_id} {kept} --revision {revision}`."
            )
            return
        revisions = {**self._pushed(iteration), revision: commit.oid}
        write_text(self.store.path(iteration, _RECORD), to_json({"repo": self.repo_id, "revisions": revisions}))
        if all(name in revisions for number, name in self._wanted(iteration + 1, False) if number == iteration):
            remove(self._kept(iteration))
        if not self.args.hub_iteration_revisions:  # then only the newest counts
            remove(self.store.output_dir / _KEPT)

    def _pushed(self, iteration: int) -> dict[str, str]:
        """Revisions of the repository that have an iteration's result, and their commits."""
        path = self.store.path(iteration, _RECORD)
        record = json.loads(path.read_text()) if path.exists() else {}
        return record["revisions"] if record.get("repo") == self.repo_id else {}

    def _source(self, iteration: int, is_end: bool) -> Path | None:
        kept = self._kept(iteration)
        if kept.is_dir():
            return kept
        for checkpoint in self.store.checkpoints():
            place = _place_of(checkpoint)
            if place is not None and place.run_id == self.store.run_id and place.iteration == iteration:
                if place.is_iteration_done or is_end:
                    return checkpoint
        return None

    def _keep(self, iteration: int, source: Path, card: str) -> Path:
        """A copy of a model that could not be pushed, since its checkpoint will be deleted one day."""
        path = self._kept(iteration)

        def write(temporary: Path) -> None:
            temporary.mkdir()
            for name in model_files(source):
                (temporary / name).parent.mkdir(exist_ok=True)
                _link_or_copy(source / name, temporary / name)
            (temporary / "README.md").write_text(card)

        if source != path:
            write_directory(path, write)
        return path

    def _kept(self, iteration: int) -> Path:
        return self.store.output_dir / _KEPT / f"iteration-{iteration}"


def _link_or_copy(source: Path, target: Path) -> None:
    """Checkpoints never change, so that a second name for the same file is as good as a copy."""
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _place_of(checkpoint: Path) -> Place | None:
    try:
        return Place.read(checkpoint)
    except (OSError, ValueError, TypeError):
        return None
