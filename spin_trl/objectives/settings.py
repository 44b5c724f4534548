"""What a run's losses ask of its other settings, given by name. Knows their traits, no formula, files and models."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..config_checks import NumberRule, check_weights
from .objective import OBJECTIVES, objectives_of


_ONE_REFERENCE = "it needs answers that were sampled from the reference, which then is the opponent alone"
_ONE_BY_ONE = "it judges each side by itself, and what those pairs leave is not the data's and the opponent's"
_OTHER_PAIRS = "it needs pairs of a ground truth and an opponent's answer, and these are others"
_ONE_LENGTH = "it is of all pairs of one forward pass, and those of one length are not the data's"
_NORMALISER = "it does not see the difference of the two sides alone, in which the mixture's normaliser cancels"
_NOT_DEFINED = "the two are not defined together"

# A trait, a setting that goes with no loss that has it, when it does so, and why.
_CONFLICTS = (
    ("needs_samples_of_reference", "reference_mixture_alpha", lambda alpha: alpha > 0, _ONE_REFERENCE),
    ("needs_samples_of_reference", "num_opponents", lambda number: number > 1, _ONE_REFERENCE),
    ("needs_samples_of_reference", "identical_pairs", lambda name: name == "drop", _ONE_BY_ONE),
    ("needs_data_and_opponent", "pairing", lambda name: name != "ground_truth", _OTHER_PAIRS),
    ("needs_data_and_opponent", "preference_dataset", bool, _OTHER_PAIRS),
    ("is_of_batch", "train_sampling_strategy", lambda name: name == "group_by_length", _ONE_LENGTH),
    ("needs_normaliser", "reference_mixture_alpha", lambda alpha: 0 < alpha < 1, _NORMALISER),
    ("is_own", "ld_alpha", lambda alpha: alpha is not None, _NOT_DEFINED),
    ("is_own", "use_weighting", bool, _NOT_DEFINED),
    ("is_own", "f_divergence_type", lambda name: name != "reverse_kl", _NOT_DEFINED),
)

# Answers that were sampled with these values are samples of the opponent as it is, and of the newest one alone.
_PLAIN_SAMPLING = {
    "temperature": 1,
    "top_p": 1,
    "top_k": 0,
    "repetition_penalty": 1,
    "generation_kwargs": None,
    "num_history_iterations": 0,
}


def check_losses(loss_types: Sequence[str], loss_weights: Any, changed: Mapping[str, Any]) -> None:
    """
    `ValueError` if no loss is named, or one that is unknown; if the weights are not theirs; or if one of the `changed`
    settings, which are not at their defaults, is read by another loss alone.
    """
    if not loss_types:
        raise ValueError("`loss_type` is empty: at least one loss is needed. Leave it unset for SPIN's, 'sigmoid'.")
    in_use = fields_in_use(loss_types)
    check_weights("loss_weights", loss_weights, "Leave out the losses that should not count.", minimum=0)
    if loss_weights is not None and len(loss_weights) != len(loss_types):
        raise ValueError(
            f"`loss_weights` has {len(loss_weights)} value(s) ({loss_weights}), but `loss_type` names "
            f"{len(loss_types)} ({loss_types}). Give one weight for each loss, or none to weigh all alike."
        )
    for loss in OBJECTIVES.values():
        for name in loss.fields:
            if name in changed and name not in in_use:
                raise ValueError(
                    f"`{name}={changed[name]!r}` belongs to the loss '{loss.name}', which `loss_type` ({loss_types}) "
                    f"does not name. Add '{loss.name}' to `loss_type`, or leave `{name}` unset."
                )


def check_settings(loss_types: Sequence[str], settings: Mapping[str, Any]) -> None:
    """`ValueError` if one of the settings contradicts a loss, or has no effect on any."""
    losses = objectives_of(loss_types)
    for loss in losses:
        for trait, field, is_set, reason in _CONFLICTS:
            if field in settings and getattr(loss, trait) and is_set(value := settings[field]):
                shown = f"{field}={value!r}" if isinstance(value, str | int | float) else field
                others = [other.name for other in OBJECTIVES.values() if not getattr(other, trait)]
                raise ValueError(
                    f"`loss_type={loss.name!r}` contradicts `{shown}`: {reason}. Leave `{field}` unset, or use "
                    f"one of {others}."
                )
    alpha = settings.get("reference_mixture_alpha", 0)
    if alpha > 0 and not any(loss.sees_reference for loss in losses):
        raise ValueError(
            f"`reference_mixture_alpha={alpha:g}` has no effect: no loss of `loss_type` ({loss_types}) has a "
            "reference. Leave it unset, or add a loss that has one, such as 'sigmoid'."
        )


def check_pairs_per_forward(loss_types: Sequence[str], num_pairs: int) -> None:
    """`ValueError` if the pairs of one forward pass, on all processes, are too few for a loss of a whole batch."""
    if depends_on_batch(loss_types) and num_pairs < 2:
        name = next(loss.name for loss in objectives_of(loss_types) if loss.is_of_batch)
        raise ValueError(
            f"`loss_type={name!r}` takes its expectations over the pairs of one forward pass, on all processes, "
            "but `per_device_train_batch_size` makes that a single pair. Raise it, and lower "
            "`gradient_accumulation_steps` as much; or use more processes."
        )


def fields_in_use(loss_types: Sequence[str]) -> dict[str, NumberRule]:
    """The fields that these losses read, besides `beta`, and what they may be."""
    return {name: rule for loss in objectives_of(loss_types) for name, rule in loss.fields.items()}


def default_settings(loss_types: Sequence[str]) -> dict[str, Any]:
    """
    What the fields that are left unset are for these losses.

    Answers of an older opponent are no samples of the reference: a loss that needs such leaves the optimum again that
    it has reached (`tests/test_theory.py`). And the expectations of a loss of a batch are those of the data only over
    pairs that were drawn whatever their lengths.
    """
    needs_samples = any(loss.needs_samples_of_reference for loss in objectives_of(loss_types))
    return {
        "num_history_iterations": 0 if needs_samples else 1,
        "train_sampling_strategy": "random" if depends_on_batch(loss_types) else "group_by_length",
    }


def sampling_caveats(loss_types: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
    """What keeps the answers from being samples of the reference, where a loss needs that they are."""
    names = [loss.name for loss in objectives_of(loss_types) if loss.needs_samples_of_reference]
    return [
        f"`loss_type='{names[0]}'` leads to the data's distribution if the answers are samples of the opponent as it "
        f"is; with `{field}={settings[field]!r}` they are others. Leave it unset, unless you have measured that it "
        "helps."
        for field, value in _PLAIN_SAMPLING.items()
        if names and settings[field] != value
    ]


def needs_initial_answers(loss_types: Sequence[str], settings: Mapping[str, Any]) -> bool:
    """Whether a loss compares with the initial policy's answers."""
    seen = [loss.sees_initial for loss in objectives_of(loss_types)]
    return any(settings[weight] > 0 if isinstance(weight, str) else weight for weight in seen)


def keeps_identical_pairs(identical_pairs: str | None, loss_types: Sequence[str]) -> bool:
    """Whether pairs of equal sides are trained on: by "keep", by "drop", or, if `None`, by what the losses can use."""
    if identical_pairs is not None:
        return identical_pairs == "keep"
    return any(loss.learns_from_identical_pairs for loss in objectives_of(loss_types))


def depends_on_batch(loss_types: Sequence[str]) -> bool:
    """Whether a loss has another value if an optimizer step is divided otherwise over forward passes."""
    return any(loss.is_of_batch for loss in objectives_of(loss_types))
