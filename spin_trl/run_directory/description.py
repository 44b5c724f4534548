"""What `self_play.json` says of a run, and whether it is that of another one. Knows nothing of files and models.

A run binds what changes its pairs, its losses, their order or their schedule. Where and how fast it runs is free:
paths, servers, logging, batch sizes per device as long as their product is the same. It may also be played longer.
"""

import re
from dataclasses import MISSING, fields
from typing import Any

from ..objectives.objective import OBJECTIVES
from ..objectives.settings import default_settings
from ..spin_config import SPINConfig


_BINDING_FIELDS = """
    num_iterations epochs_per_iteration num_history_iterations num_generations num_opponents pairing reward_weights
    identical_pairs max_completion_length temperature top_p top_k repetition_penalty generation_kwargs
    eval_temperature max_length truncation_mode skip_invalid_rows
    loss_type loss_weights beta label_smoothing f_divergence_type f_alpha_divergence_coef discopop_tau ld_alpha
    use_weighting reference_mixture_alpha disable_dropout
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps max_steps reset_optimizer optim optim_args
    weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm neftune_noise_alpha
    seed data_seed train_sampling_strategy dataloader_drop_last bf16 fp16 model_init_kwargs
""".split()
# Of an adapter and a quantization: where they came from, and which release wrote them down.
_FREE_PARTS = {"base_model_name_or_path", "inference_mode", "peft_version", "revision"}

# Filled in by transformers and TRL, whatever the user sets.
_DERIVED = {"accelerator_config", "local_rank", "logging_dir", "num_train_epochs", "output_dir", "pad_token"}

_SECRET_NAME = re.compile(r"(^|_)(token|password|secret|api_key)$")
_SECRET_TEXTS = (
    (re.compile(r"(?<=://)[^/@\s]+@"), ""),
    (re.compile(r"(?<![\w-])(--[\w-]*(?:token|password|secret|key)[= ]+)\S+"), r"\1<secret>"),
    (re.compile(r"\bhf_\w{16,}"), "<secret>"),
)


def differences(stored: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """
    What keeps the present run from continuing a stored one.

    Args:
        stored, present (`dict[str, Any]`): Descriptions as in `self_play.json`, with `model`, `adapter`,
            `quantization`, `reward_functions`, `training`, `config` and `data`.

    Returns:
        `list[str]`: one entry for each field that differs, with both values.
    """
    there, now = _what_binds(stored), _what_binds(present)
    found = []
    for name in {**there, **now}:
        value, other = there.get(name), now.get(name)
        if name in ("adapter", "quantization") and isinstance(value, dict) and isinstance(other, dict):
            # Of what both know: another release may have added or dropped a field.
            shared = sorted(value.keys() & other.keys() - _FREE_PARTS)
            value, other = ({name: part[name] for name in shared} for part in (value, other))
        if not (_is_same(value, other) or _grows(name, value, other)):
            found.append(f"`{name}`: {value!r} there, {other!r} now")
    return found


def changed_settings(args: SPINConfig) -> list[str]:
    """Names of the fields whose values are not the defaults, sorted. A list of one value counts as that value."""
    values = args.to_dict()
    defaults = _defaults(args.loss_type)
    changed = [name for name in values.keys() & defaults.keys() if not _is_same(values[name], defaults[name])]
    changed = {name for name in changed if values[name] or defaults[name] or values[name] is False}  # none is none
    return sorted(changed - _DERIVED - {name for name in changed if _SECRET_NAME.search(name)})


def without_secrets(value: Any) -> Any:
    """A description without what looks like a token or a password, in whatever setting it was given."""
    if isinstance(value, dict):
        return {
            name: "<secret>" if content and _SECRET_NAME.search(str(name)) else without_secrets(content)
            for name, content in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets(content) for content in value]
    if isinstance(value, str):
        for pattern, replacement in _SECRET_TEXTS:
            value = pattern.sub(replacement, value)
    return value


def _what_binds(description: dict[str, Any]) -> dict[str, Any]:
    """Each field by its name. A setting that the description lacks has its default."""
    binding = {name: description.get(name) for name in ("model", "reward_functions", "adapter", "quantization")}
    for part in ("training", "data"):
        binding |= {f"{part}.{name}": value for name, value in description.get(part, {}).items()}
    config = description.get("config", {})
    losses = config.get("loss_type", ["sigmoid"])
    config = {**_defaults([losses] if isinstance(losses, str) else losses), **config}
    of_losses = [name for objective in OBJECTIVES.values() for name in objective.fields]
    return binding | {name: config.get(name) for name in (*_BINDING_FIELDS, *of_losses)}


def _defaults(loss_type: list[str]) -> dict[str, Any]:
    values = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(SPINConfig)
    }
    return {name: getattr(value, "value", value) for name, value in values.items()} | default_settings(loss_type)


def _is_same(value: Any, other: Any) -> bool:
    """Whether two values are the same setting: a list of one is that one."""
    return value in (other, [other]) or [value] == other


def _grows(name: str, stored: Any, present: Any) -> bool:
    """Whether the present value only adds iterations to the stored one."""
    if name == "num_iterations":
        return isinstance(stored, int) and isinstance(present, int) and present >= stored
    if name in ("beta", "learning_rate") and isinstance(stored, list) and isinstance(present, list):
        return present[: len(stored)] == stored
    return False
