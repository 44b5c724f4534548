"""An earlier iteration's policy back in the trainer, from the opponent that was saved of it. Knows nothing of why."""

import os
from typing import TYPE_CHECKING, Any

from accelerate.utils import str_to_bool
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from .publication import Publication
from .run_paths import RunDirectoryError


if TYPE_CHECKING:
    from .spin_trainer import SPINTrainer


def check_can_take_back(setting: str, publication: Publication, adapter: dict[str, Any] | None) -> None:
    """
    Args:
        setting (`str`): What asks for it, as in the configuration.
        publication ([`Publication`]): In which form opponents are saved.
        adapter (`dict`, *optional*): Configuration of the adapter that is trained.

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
            f"`{setting}` loads the opponent of an earlier iteration into the policy, but {reason}. Leave it unset: "
            "every opponent is saved in `iteration-*/opponent`, and `self_play.json` names the one that counts."
        )


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
