"""The fields of the losses in `losses.py`: what they may be, and what they go with. Knows no files and models."""

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..config_checks import NumberRule, not_negative, positive
from .losses import BATCH_LOSSES, REFERENCE_FREE_LOSSES, LossParameters


if TYPE_CHECKING:
    from ..spin_config import SPINConfig


OBJECTIVE_NUMBERS = {
    "space_mu": positive(),
    "t_spin_alpha": positive(),
    "t_spin_beta": not_negative(),
    "iris_alpha": NumberRule(
        "positive and other than 1, where the loss is not defined",
        lambda value: value > 0 and value != 1,
        remedy="Take 0.5, the default, or for the limits at 0 and at 1 a number near them, such as 0.01 or 0.99.",
    ),
}

# Field -> the loss that reads it.
_LOSS_OF_FIELD = {"space_mu": "space", "t_spin_alpha": "t_spin", "t_spin_beta": "t_spin", "iris_alpha": "iris"}

# Losses whose optimum is the data's distribution because the reference is what the answers were sampled from.
_NEED_THE_OPPONENT = ("space", "iris")


def loss_defaults(loss_types: Sequence[str]) -> dict[str, Any]:
    """
    What the fields that are left unset are for these losses.

    `space` and `iris` compare a distribution with the reference that it was sampled from, and answers of an older
    opponent are not of that one: with them an optimum that has been reached is left again (`tests/test_theory.py`). And
    the expectations of `iris` are those of the data only over pairs that were drawn whatever their lengths.
    """
    return {
        "num_history_iterations": 0 if set(_NEED_THE_OPPONENT) & set(loss_types) else 1,
        "train_sampling_strategy": "random" if "iris" in loss_types else "group_by_length",
    }


def fields_in_use(args: "SPINConfig") -> list[str]:
    """Names of the fields that one of the run's losses reads."""
    return [name for name, loss in _LOSS_OF_FIELD.items() if loss in args.loss_type]


def loss_parameters(args: "SPINConfig", beta: float) -> LossParameters:
    """What the losses read, with the iteration's `beta`."""
    return LossParameters(beta, **{name: getattr(args, name) for name in _LOSS_OF_FIELD})


def check_objective(args: "SPINConfig") -> None:
    """
    Raises:
        `ValueError`: if a field is set whose loss is not used, or contradicts another.
    """
    _check_fields_are_used(args)
    _check_reference(args)
    if "space" in args.loss_type and args.space_mu > args.num_generations:
        raise ValueError(
            f"`space_mu={args.space_mu:g}` means so many generated answers for each real one, but `num_generations` is "
            f"{args.num_generations}. Set `num_generations={math.ceil(args.space_mu)}`, or lower `space_mu` to at most "
            f"{args.num_generations}."
        )
    if args.identical_pairs == "drop" and (names := [n for n in _NEED_THE_OPPONENT if n in args.loss_type]):
        raise ValueError(
            f"`loss_type='{names[0]}'` contradicts `identical_pairs='drop'`: it learns from the two sides one by one, "
            "and without those pairs they are no longer the data's and the opponent's. Leave `identical_pairs` unset."
        )
    if "iris" in args.loss_type and args.train_sampling_strategy == "group_by_length":
        raise ValueError(
            "`loss_type='iris'` contradicts `train_sampling_strategy='group_by_length'`: it takes its expectations "
            "over the pairs of one forward pass, and those of one length are not the data's. Leave it unset, for "
            "'random'."
        )
    if "iris" in args.loss_type and args.auto_find_batch_size:
        raise ValueError(
            "`loss_type='iris'` contradicts `auto_find_batch_size`: its value depends on how many pairs a forward pass "
            "holds, which that changes during the run. Leave `auto_find_batch_size` unset, and set "
            "`per_device_train_batch_size` to what fits."
        )
    if "iris" in args.loss_type and _pairs_per_forward(args) < 2:
        raise ValueError(
            "`loss_type='iris'` takes its expectations over the pairs of one forward pass, on all processes, but with "
            f"`per_device_train_batch_size={args.per_device_train_batch_size}` and {args.world_size} process that is a "
            "single pair. Raise `per_device_train_batch_size`, and lower `gradient_accumulation_steps` as much; or use "
            "more processes."
        )


def sampling_caveats(args: "SPINConfig") -> list[str]:
    """What keeps the answers from being samples of the reference, where a loss compares them with it."""
    names = [name for name in _NEED_THE_OPPONENT if name in args.loss_type]
    if not names:
        return []
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
    found = [f"`{name}={getattr(args, name)!r}`" for name, value in plain.items() if getattr(args, name) != value]
    if args.num_history_iterations > 0:
        found.append(f"`num_history_iterations={args.num_history_iterations}`")
    return [
        f"`loss_type='{names[0]}'` leads to the data's distribution if the answers are samples of the opponent as it "
        f"is; with {setting} they are others. Leave it unset, unless you have measured that it helps."
        for setting in found
    ]


def batch_losses_depend_on(args: "SPINConfig") -> dict[str, Any]:
    """What the value of a whole batch's loss depends on besides the fields: how an optimizer step is divided."""
    return {"pairs_per_forward": _pairs_per_forward(args)} if set(BATCH_LOSSES) & set(args.loss_type) else {}


def _pairs_per_forward(args: "SPINConfig") -> int:
    return args.train_batch_size * args.world_size


def _check_fields_are_used(args: "SPINConfig") -> None:
    defaults = {field.name: field.default for field in fields(args)}
    in_use = fields_in_use(args)
    for name, loss in _LOSS_OF_FIELD.items():
        if name not in in_use and getattr(args, name) != defaults[name]:
            raise ValueError(
                f"`{name}={getattr(args, name)!r}` belongs to the loss '{loss}', which `loss_type` ({args.loss_type}) "
                f"does not name. Add '{loss}' to `loss_type`, or leave `{name}` unset."
            )


def _check_reference(args: "SPINConfig") -> None:
    fields_set = {
        "opponent_reference": args.opponent_reference == "fixed",
        "reference_mixture_alpha": args.reference_mixture_alpha > 0,
        "num_opponents": args.num_opponents > 1,
    }
    for field in [field for field, is_set in fields_set.items() if is_set]:
        setting = f"`{field}={getattr(args, field)!r}`"
        for name in _NEED_THE_OPPONENT:
            if name in args.loss_type:
                raise ValueError(
                    f"`loss_type='{name}'` contradicts {setting}: it leads to the data's distribution only if the "
                    f"reference is the opponent that the answers were sampled from. Leave `{field}` unset, or use "
                    f"another loss than '{name}'."
                )
        if field != "num_opponents" and _has_no_reference(args):
            raise ValueError(
                f"{setting} has no effect: of `loss_type` ({args.loss_type}) no loss has a reference. Leave `{field}` "
                "unset, or add a loss that has one, such as 'sigmoid'."
            )


def _has_no_reference(args: "SPINConfig") -> bool:
    return "t_spin" in args.loss_type and set(args.loss_type) <= set(REFERENCE_FREE_LOSSES)
