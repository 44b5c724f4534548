"""An earlier iteration's policy back in the trainer, for good or for a while, from the opponent that was saved of it.

Knows nothing of why.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import is_peft_model

from ..policy.adapters import precisions_of, restore_precisions
from ..processes.ranks import on_every_process
from ..run_directory.run_paths import RunDirectoryError


if TYPE_CHECKING:
    from ..spin_trainer import SPINTrainer


def take_back(trainer: "SPINTrainer", opponent: int) -> None:
    """
    Make the policy the opponent of an iteration again. Every process calls it.

    Raises:
        [`RunDirectoryError`]: if that opponent is not on disk.
    """
    path = trainer.store.path(opponent, "opponent")
    if not path.is_dir():
        raise RunDirectoryError(
            f"{path}, the policy to return to, is not there. The last policy is in the newest checkpoint; to go on "
            "without the earlier one, leave `load_best_iteration_at_end` and `on_collapse` unset."
        )
    precisions = precisions_of(trainer.model)
    trainer._load_from_checkpoint(str(path))
    restore_precisions(trainer.model, precisions)
    trainer.accelerator.print(f"The policy is again the opponent of iteration {opponent}, from {path}.")


@contextmanager
def lent_to_opponent(trainer: "SPINTrainer", path: Path) -> Iterator[None]:
    """
    The policy is an earlier opponent for a while, and itself again afterwards, bit for bit. Every process enters this.

    What is trained waits in host memory meanwhile. Tensors stay the ones that the optimizer knows: only their numbers
    are exchanged, and nobody is told.

    Args:
        path (`Path`): Where the opponent was saved.
    """
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    own = [parameter.detach().to("cpu", copy=True) for parameter in trained]
    try:
        on_every_process(lambda: _load_numbers(trainer, path))
        yield
    finally:
        with torch.no_grad():
            for parameter, numbers in zip(trained, own, strict=True):
                parameter.copy_(numbers)


def _load_numbers(trainer: "SPINTrainer", path: Path) -> None:
    if not is_peft_model(trainer.model):
        trainer._load_from_checkpoint(str(path))
        return
    from peft import load_peft_weights, set_peft_model_state_dict

    # Not `load_adapter`, which Trainer calls: it would change the adapter's precision.
    set_peft_model_state_dict(trainer.model, load_peft_weights(str(path), device="cpu"), adapter_name="default")
