"""A model to the hub, and nothing else of a run: no data, no answers, no optimizer. Knows nothing of training.

Trainer's own upload takes the whole run directory; this one picks the files. The hub makes no new commit of files that
it has already, so a model may be pushed again whenever it is not known whether that was done.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub import CommitInfo, create_branch, upload_folder
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..processes.ranks import on_main_process
from ..run_directory.checkpoints import Place
from ..run_directory.store import IterationStore
from ..run_directory.whole_files import write_text
from ..spin_config import SPINConfig
from .model_card import CARD, with_self_play


logger = logging.getLogger(__name__)

_MODEL_FILES = """
    *.safetensors *.safetensors.index.json config.json generation_config.json adapter_config.json README.md
    tokenizer* *processor_config.json special_tokens_map.json added_tokens.json vocab.* merges.txt
    chat_template.* additional_chat_templates/*.jinja
""".split()


def push_model(
    folder: str | Path, repo_id: str, revision: str | None, message: str | None, token: str | None
) -> CommitInfo:
    """
    Push weights, configuration, tokenizer and card that lie in a folder, in one commit.
    The branch, `revision`, is made where there is none; by default it is the main one, and the token this machine's.

    Raises:
        Whatever `huggingface_hub` raises.
    """
    files = {path.relative_to(folder).as_posix() for pattern in _MODEL_FILES for path in Path(folder).glob(pattern)}
    if revision not in (None, "main"):
        create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    return upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=sorted(files),
        revision=revision,
        commit_message=message,
        token=token,
    )


@contextmanager
def warns_of_failed_push(repo_id: str, revision: str | None) -> Iterator[None]:
    """Training is worth more than its copy on the hub: whatever goes wrong with that is a warning."""
    try:
        yield
    except Exception as error:
        logger.warning(
            f"The model could not be pushed to {repo_id}, revision {revision or 'main'!r}: {type(error).__name__}: "
            f"{error}\nThe run goes on. What is missing on the hub is pushed when the next iteration begins, when the "
            "run is over, and when it is started again with `resume='auto'`, as long as its checkpoint is there; "
            "`trainer.push_to_hub()` does it too."
        )


class PushIterations(TrainerCallback):
    """
    Pushes what each iteration made, once it has been evaluated, as a revision of its own: `iteration-0` and so on.

    It takes the checkpoints in which iterations end. An epoch begins for it after the one that plays has seen it begin.
    """

    def __init__(self, store: IterationStore, repo_id: str):
        self.store = store
        self.repo_id = repo_id
        self._pushed: set[Path] = set()

    def on_epoch_begin(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        on_main_process(lambda: self._push_missing(args))

    on_push_begin = on_epoch_begin

    def _push_missing(self, args: SPINConfig) -> None:
        for checkpoint in reversed(self.store.checkpoints()):
            iteration = _iteration_that_ends_in(checkpoint, self.store.run_id)
            if iteration is None or checkpoint in self._pushed:
                continue
            revision = f"iteration-{iteration}"
            with warns_of_failed_push(self.repo_id, revision):
                card = (self.store.output_dir / CARD).read_text()
                write_text(checkpoint / CARD, with_self_play(card, self.store.all_metrics(), args, last=iteration))
                push_model(checkpoint, self.repo_id, revision, f"SPIN, iteration {iteration}", args.hub_token)
                self._pushed.add(checkpoint)


def _iteration_that_ends_in(checkpoint: Path, run_id: str) -> int | None:
    """The number of the iteration of the run that ends in a checkpoint, if one does."""
    with suppress(OSError, ValueError, TypeError):  # it is none of a self-play run
        place = Place.read(checkpoint)
        return place.iteration if place.run_id == run_id and place.is_iteration_done else None
