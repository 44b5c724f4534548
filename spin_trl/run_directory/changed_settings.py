"""Which settings of a run its user, or the data, made differ from the defaults. For whoever looks at a run later."""

from dataclasses import MISSING, fields
from typing import Any

from ..objectives.settings import default_settings
from ..spin_config import SPINConfig


# Filled in by transformers and TRL, whatever the user sets.
_DERIVED = {
    "accelerator_config",
    "hub_token",
    "local_rank",
    "logging_dir",
    "num_train_epochs",
    "output_dir",
    "pad_token",
    "vllm_api_key",
}


def changed_settings(args: SPINConfig) -> list[str]:
    """Names of the fields whose values are not the defaults, sorted. A list of one value counts as that value."""
    values = args.to_dict()
    defaults = {field.name: _default_of(field) for field in fields(args)} | default_settings(args.loss_type)
    names = (name for name, default in defaults.items() if not _is_default(values.get(name), default))
    return sorted(name for name in names if name not in _DERIVED and name in values)


def _default_of(field) -> Any:
    return (
        field.default_factory() if field.default is MISSING and field.default_factory is not MISSING else field.default
    )


def _is_default(value: Any, default: Any) -> bool:
    if hasattr(default, "value"):  # an enumeration, as `to_dict` writes it
        default = default.value
    return value in (default, [default]) or [value] == default or (not value and not default and value is not False)
