"""A trained adapter merged into its base model, to be served or trained on without PEFT. Knows nothing of self-play.

The main process merges on its own, in its own memory, from the files of both: so it makes no difference whether the
policy is sharded or its base is quantised.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import is_peft_model
from transformers import AutoConfig
from trl.trainer.utils import create_model_from_path

from ..processes.ranks import on_every_process, on_main_process
from ..run_directory.footprint import of_this_process_alone, size_of_weights
from ..run_directory.whole_files import remove, temporary_path, write_directory
from .inputs import source_kwargs


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel
    from trl import DPOTrainer

    from ..spin_config import SPINConfig

# Methods of PEFT that have no weights of their own to add to the base's.
_UNMERGEABLE = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT")


def check_can_merge(
    model: "str | PreTrainedModel | PeftModel", peft_config: "PeftConfig | None", base_model: str, args: "SPINConfig"
) -> None:
    """
    See, before a model is loaded, that there will be an adapter that can be merged, and a base to merge it into.

    Raises:
        `ValueError`: if not.
    """
    if peft_config is None and not isinstance(model, str) and is_peft_model(model):
        peft_config = model.peft_config["default"]
    if peft_config is None:
        raise ValueError(
            "`merge_adapter_at_end=True` merges an adapter, but there is none: all weights are trained, and saved. "
            "Leave it unset, or pass a `peft_config`."
        )
    if peft_config.peft_type in _UNMERGEABLE:
        raise ValueError(
            f"`merge_adapter_at_end=True` cannot merge an adapter with `peft_type={peft_config.peft_type.value}`: it "
            "has no weights to add to the model's. Leave it unset, or use a `LoraConfig`."
        )
    if not base_model:
        raise ValueError(
            "`merge_adapter_at_end=True` merges into the base model as it was saved, but the model passed comes from "
            "no folder and no hub. Save it with `model.save_pretrained(folder)` and pass `model=folder`."
        )
    config = AutoConfig.from_pretrained(base_model, **source_kwargs(args))
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"`merge_adapter_at_end=True` merges into unquantised weights, but those of {base_model!r} are saved "
            "quantised. Pass the model that was quantised and a `quantization_config`, or leave it unset."
        )


def save_merged_model(trainer: "DPOTrainer", base_model: str, directory: Path) -> None:
    """
    Save the policy with its adapter merged into the base, in the base's own precision. Every process calls it.

    Args:
        trainer ([`~trl.DPOTrainer`]): Holds the policy, a [`~peft.PeftModel`].
        base_model (`str`): Folder or hub id of the base.
        directory (`Path`): Where to. What lies there is replaced, in one step.

    Raises:
        [`DiskError`]: if the disk does not take it.
    """
    adapter = temporary_path(directory.with_name(f"{directory.name}-adapter"), shared=True)

    def merge() -> None:
        model = _merge(base_model, adapter, trainer.args)

        def write(temporary: Path) -> None:
            model.save_pretrained(temporary)
            trainer.processing_class.save_pretrained(temporary)

        write_directory(directory, write, num_bytes=size_of_weights(model))

    on_every_process(lambda: trainer.save_model(str(adapter), _internal_call=True))
    try:
        on_main_process(merge)
    finally:
        if trainer.is_world_process_zero():
            remove(adapter)
    quantised = " without its quantisation" if getattr(trainer.model, "is_quantized", False) else ""
    trainer.accelerator.print(f"Saved the adapter merged into {base_model}{quantised} to {directory}")


def _merge(base_model: str, adapter: Path, args: "SPINConfig") -> "PreTrainedModel":
    from peft import PeftModel

    with of_this_process_alone():
        base = create_model_from_path(base_model, **source_kwargs(args), dtype="auto", device_map=None)
        return PeftModel.from_pretrained(base, adapter).merge_and_unload(safe_merge=True)
