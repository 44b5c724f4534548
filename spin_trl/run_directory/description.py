"""Is a run directory that of this run? What two descriptions of a run differ in. Knows nothing of files and models.

What only says where and how fast a run runs may differ: paths, servers, logging, batch sizes per device as long as
their product is the same. And a run may be played longer than it was to be at first.
"""

from typing import Any


_FREE_FIELDS = {
    "activation_offloading",
    "auto_find_batch_size",
    "batch_eval_metrics",
    "convergence_tolerance",
    "dataset_num_proc",
    "debug",
    "deepspeed",
    "disable_tqdm",
    "do_eval",
    "do_predict",
    "do_train",
    "enable_jit_checkpoint",
    "eval_accumulation_steps",
    "eval_on_error",
    "fsdp",
    "fsdp_config",
    "generation_part_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "greater_is_better_iteration",
    "local_rank",
    "merge_adapter_at_end",
    "metric_for_best_iteration",
    "num_completions_to_print",
    "num_train_epochs",
    "offload_policy_during_generation",
    "on_collapse",
    "output_dir",
    "overwrite_output_dir",
    "per_device_eval_batch_size",
    "per_device_generation_batch_size",
    "per_device_train_batch_size",
    "precompute_ref_batch_size",
    "project",
    "report",
    "report_to",
    "resume",
    "resume_from_checkpoint",
    "run_name",
    "skip_memory_metrics",
    "stop_when_converged",
    "torch_empty_cache_steps",
    "use_cpu",
    "use_vllm",
}
_FREE_PREFIXES = ("ddp_", "hub_", "log_", "logging_", "publish_check_", "push_", "save_", "trackio_", "vllm_")
_MAY_GROW = "num_iterations"


def differences(stored: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """
    What keeps the present run from continuing a stored one.

    Args:
        stored, present (`dict[str, Any]`): Descriptions as in `self_play.json`, with `model`, `adapter`,
            `quantization`, `reward_functions`, `training`, `config` and `data`.

    Returns:
        `list[str]`: one entry for each field that differs, with both values.
    """
    names = ("model", "adapter", "quantization", "reward_functions")
    found = _compare("", _only(stored, names), _only(present, names))
    for part in ("training", "data"):
        found += _compare(f"{part}.", stored.get(part, {}), present.get(part, {}))
    return found + _compare("", _binding(stored.get("config", {})), _binding(present.get("config", {})))


def _only(description: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: description.get(name) for name in names}


def _binding(config: dict[str, Any]) -> dict[str, Any]:
    """The fields on which a run's result depends."""
    return {name: value for name, value in config.items() if not _is_free(name)}


def _is_free(name: str) -> bool:
    if name.startswith("dataloader_"):
        return name != "dataloader_drop_last"
    return name in _FREE_FIELDS or name.startswith(_FREE_PREFIXES)


def _compare(prefix: str, stored: dict[str, Any], present: dict[str, Any]) -> list[str]:
    return [
        f"`{prefix}{name}`: {stored.get(name)!r} there, {present.get(name)!r} now"
        for name in sorted({*stored, *present})
        if stored.get(name) != present.get(name) and not _grows(name, stored.get(name), present.get(name))
    ]


def _grows(name: str, stored: Any, present: Any) -> bool:
    """Whether the present value only adds iterations to the stored one."""
    if name == _MAY_GROW:
        return isinstance(stored, int) and isinstance(present, int) and present >= stored
    if name in ("beta", "learning_rate") and isinstance(stored, list) and isinstance(present, list):
        return present[: len(stored)] == stored
    return False
