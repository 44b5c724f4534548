"""An earlier iteration's policy back in the trainer, for good or for a while, from the opponent that was saved of it.

Knows nothing of why.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model, str_to_bool
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..policy.published_form import Publication
from ..processes.ranks import on_every_process
from ..run_directory.run_paths import RunDirectoryError


if TYPE_CHECKING:
    from ..spin_trainer import SPINTrainer


_ON_DISK = (
    "Leave it unset: every opponent is saved in `iteration-*/opponent`, and `self_play.json` names the one that counts."
)


def check_can_take_back(
    setting: str, publication: Publication, adapter: dict[str, Any] | None, remedy: str = _ON_DISK
) -> None:
    """
    Args:
        setting (`str`): What asks for it, as in the configuration.
        publication ([`Publication`]): In which form opponents are saved.
        adapter (`dict`, *optional*): Configuration of the adapter that is trained.
        remedy (`str`): What to do about it.

    Raises:
        `ValueError`: if a saved opponent could not be loaded into the policy.
    """
    adapter = adapter or {}
    reason = None
    if is_deepspeed_zero3_enabled() or str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")):
        reason = "under ZeRO-3 and FSDP each process holds only shards of it"
    elif publication.kind == "merged":
        reason = f"opponents are saved merged here, because vLLM cannot load adapters with {publication.reason}"
    elif publication.lora_rank is not None and (adapter.get("rank_pattern") or adapter.get("alpha_pattern")):
        reason = "for vLLM, opponents are saved with the scaling of `rank_pattern` and `alpha_pattern` in their weights"
    if reason is not None:
        raise ValueError(
            f"`{setting}` loads the opponent of an earlier iteration into the policy, but {reason}. {remedy}"
        )


def check_can_lend(num_opponents: int, publication: Publication, adapter: dict[str, Any] | None) -> None:
    """
    As [`check_can_take_back`], for [`lent_to_opponent`].

    Raises:
        `ValueError`: if the policy could not play an earlier opponent in-process.
    """
    remedy = "Use a vLLM server, which loads opponents itself, or leave `num_opponents` unset."
    check_can_take_back(f"num_opponents={num_opponents}", publication, adapter, remedy)


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
    trainer._load_from_checkpoint(str(path))
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
