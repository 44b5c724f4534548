"""What a model card says of the self-play: scores and answers by iteration, and settings. Knows nothing of the hub."""

import math
from collections.abc import Iterable
from typing import Any

from ..evaluation.metric_names import EVALUATION, label
from ..objectives.settings import fields_in_use
from ..run_directory.store import IterationStore
from ..run_directory.whole_files import write_text
from ..spin_config import SPINConfig


CARD = "README.md"
_BEGIN, _END = "<!-- self-play -->", "<!-- end of self-play -->"
_NEXT_HEADING = "### Framework versions"
_SETTINGS = """
    num_iterations epochs_per_iteration num_history_iterations num_generations pairing loss_type loss_weights beta
    learning_rate lr_scheduler_type warmup_steps optim max_length max_completion_length temperature top_p top_k
    reference_mixture_alpha num_opponents eval_temperature seed
""".split()
_GOALS = {
    "ground_truth": "it is then trained to tell the ground truth from its own answers",
    "best_of": "it is then trained to tell the best of ground truth and answers, by their rewards, from the others",
    "reward_ranked": "it is then trained to tell the best of its own answers, by their rewards, from the worst",
}
_OF_ANSWERS = """
    num_pairs chosen_length rejected_length identical_share cut_off_share distinct_2 logps_gap opponent_nll
""".split()


def complete_card(store: IterationStore, args: SPINConfig, base_model: str) -> None:
    """Add the run so far to the card that TRL wrote into `output_dir`."""
    path = store.output_dir / CARD
    # TRL takes model and base for repositories of the hub; of what is not one it writes 'None'.
    card = path.read_text().replace("[None](https://huggingface.co/None)", f"`{base_model}`")
    card = card.replace('model="None"', f'model="{args.output_dir}"')
    write_text(path, with_self_play(card, store.all_metrics(), args))


def with_self_play(
    card: str, metrics: Iterable[tuple[int, dict[str, Any]]], args: SPINConfig, last: float = math.inf
) -> str:
    """
    A model card with a section on the self-play: before the versions, or in place of the section that it has.

    Args:
        metrics (`Iterable[tuple[int, dict]]`): Number and `metrics.json` of each iteration.
        last (`int`, *optional*): The iteration that made the model: nothing later is shown. By default everything is.
    """
    section = _section(list(metrics), args, last)
    if _BEGIN in card:
        before, _, rest = card.partition(_BEGIN)
        return before + section + rest.partition(_END)[2]
    before, heading, after = card.partition(_NEXT_HEADING)
    return f"{before.rstrip()}\n\n{section}\n\n{heading}{after}"


def _section(metrics: list[tuple[int, dict[str, Any]]], args: SPINConfig, last: float) -> str:
    scores = {label(i): values[EVALUATION] for i, values in metrics if i <= last + 1 and EVALUATION in values}
    answers = {
        f"iteration {i}": {name: values[name] for name in _OF_ANSWERS if name in values}
        for i, values in metrics
        if i <= last and "num_pairs" in values
    }
    config = args.to_dict()
    names = [name for name in (*_SETTINGS, *fields_in_use(args.loss_type)) if config.get(name) is not None]
    parts = [
        f"{_BEGIN}\n### Self-play",
        f"In every iteration the model as it stands, the opponent, answers every prompt; {_GOALS[args.pairing]}.",
        scores and "Evaluation of the model after each iteration:",
        scores and _table("after", scores),
        answers and "The opponent's answers beside the ground truth (in tokens, shares, and nats per token):",
        answers and _table("", answers),
        "Settings:",
        "\n".join(["| setting | value |", "| --- | --- |", *(f"| `{name}` | `{config[name]}` |" for name in names)]),
        _END,
    ]
    return "\n\n".join(part for part in parts if part)


def _table(corner: str, columns: dict[str, dict[str, float]]) -> str:
    """One row a column of the argument, one column for each name in any of them."""
    names = list(dict.fromkeys(name for values in columns.values() for name in values))
    rows = [
        [label, *(f"{values[name]:.4g}" if name in values else "" for name in names)]
        for label, values in columns.items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in [[corner, *names], ["---"] * (len(names) + 1), *rows])
