"""What a model card says of the self-play: scores and answers by iteration, and settings. Knows nothing of the hub."""

from collections.abc import Iterable
from typing import Any

from ..objectives.loss_settings import fields_in_use
from ..spin_config import SPINConfig


_BEGIN, _END = "<!-- self-play -->", "<!-- end of self-play -->"
_NEXT_HEADING = "### Framework versions"
_SETTINGS = (
    "num_iterations",
    "epochs_per_iteration",
    "num_history_iterations",
    "num_generations",
    "pairing",
    "loss_type",
    "loss_weights",
    "beta",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "max_length",
    "max_completion_length",
    "temperature",
    "top_p",
    "top_k",
    "opponent_reference",
    "reference_mixture_alpha",
    "num_opponents",
    "eval_temperature",
    "seed",
)
_TRAINED_TO = {
    "ground_truth": "it is then trained to tell the ground truth from its own answers",
    "best_of": "it is then trained to tell the best of ground truth and answers, by their rewards, from the others",
    "reward_ranked": "it is then trained to tell the best of its own answers, by their rewards, from the worst",
}
_SHOWN_OF_ANSWERS = (
    "num_pairs",
    "chosen_length",
    "rejected_length",
    "identical_share",
    "cut_off_share",
    "distinct_2",
    "logps_gap",
    "opponent_nll",
)


def self_play_section(metrics: Iterable[tuple[int, dict[str, Any]]], args: SPINConfig, last: int | None = None) -> str:
    """
    The part of a model card that is SPIN's, as Markdown.

    Args:
        metrics (`Iterable[tuple[int, dict]]`): Number and `metrics.json` of each iteration.
        args ([`SPINConfig`]): The settings.
        last (`int`, *optional*): The iteration that made the model: nothing later is shown. By default everything is.
    """
    shown = [(i, values) for i, values in metrics if last is None or i <= last + 1]
    scores = {_label(i): values["evaluation"] for i, values in shown if "evaluation" in values}
    answers = {f"iteration {i}": _numbers(values) for i, values in shown if last is None or i <= last}
    parts = [_BEGIN, "### Self-play", ""]
    parts += [
        f"In every iteration the model as it stands, the opponent, answers every prompt; {_TRAINED_TO[args.pairing]}."
    ]
    if scores:
        parts += ["", "Evaluation of the model after each iteration:", "", *_table("after", scores)]
    if any(answers.values()):
        parts += ["", "The opponent's answers beside the ground truth (in tokens, shares, and nats per token):", ""]
        parts += _table("", {label: values for label, values in answers.items() if values})
    config = args.to_dict()
    parts += ["", "Settings:", "", "| setting | value |", "| --- | --- |"]
    names = [*_SETTINGS, *fields_in_use(args)]
    parts += [f"| `{name}` | `{config[name]}` |" for name in names if config.get(name) is not None]
    return "\n".join([*parts, "", _END])


def with_section(card: str, section: str) -> str:
    """A model card with this section of ours in place of the one that it has, or before the versions."""
    if _BEGIN in card and _END in card:
        before, _, rest = card.partition(_BEGIN)
        return before + section + rest.partition(_END)[2]
    before, heading, after = card.partition(_NEXT_HEADING)
    return f"{before.rstrip()}\n\n{section}\n\n{heading}{after}"


def without_hub(card: str, base_model: str, folder: str) -> str:
    """TRL's card takes model and base for repositories of the hub; of what is not one it writes 'None'."""
    return card.replace("[None](https://huggingface.co/None)", f"`{base_model}`").replace(
        'model="None"', f'model="{folder}"'
    )


def _table(corner: str, columns: dict[str, dict[str, float]]) -> list[str]:
    """One row a column of the argument, one column for each name in any of them."""
    names = list(dict.fromkeys(name for values in columns.values() for name in values))
    rows = [
        [label, *(f"{values[name]:.4g}" if name in values else "" for name in names)]
        for label, values in columns.items()
    ]
    return [f"| {' | '.join(row)} |" for row in [[corner, *names], ["---"] * (len(names) + 1), *rows]]


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {name: values[name] for name in _SHOWN_OF_ANSWERS if name in values}


def _label(iteration: int) -> str:
    """An opponent is what the iteration before it made."""
    return "start" if iteration == 0 else f"iteration {iteration - 1}"
