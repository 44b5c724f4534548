"""What a run comes to: its state, the numbers at the top of the page, and what stands out. Knows nothing of HTML."""

from dataclasses import dataclass

from ..evaluation.metric_names import label
from .charts import format_number
from .run_data import RunData


_SELDOM_ENOUGH = 0.1  # share of cut-off answers above which they are worth a remark
_NEARLY_ALL = 0.9


@dataclass(frozen=True)
class Tile:
    """A number at the top of the page: what it is, its value, and a line of detail."""

    name: str
    value: str
    detail: str = ""


def state_of(run: RunData) -> str:
    """Whether the run is complete, in words."""
    total, begun = run.num_iterations, max(run.metrics, default=None)
    if run.description.get("finished"):
        return "complete" if total is None else f"complete, {total} iteration{'s' * (total != 1)}"
    if begun is None:
        return "begun"
    if total is None:
        return f"in iteration {begun}, or stopped there"
    if begun >= total:
        return f"iterations 0 to {total - 1} trained, not yet complete"
    return f"in iteration {begun} of 0 to {total - 1}, or stopped there"


def scores_of(run: RunData) -> dict[str, dict[int, float]]:
    """Evaluation score -> iteration whose opponent it is of -> value."""
    scores: dict[str, dict[int, float]] = {}
    for iteration, metrics in run.metrics.items():
        for name, value in metrics.items():
            if name.startswith("evaluation/"):
                scores.setdefault(name.removeprefix("evaluation/"), {})[iteration] = value
    return scores


def tiles_of(run: RunData) -> list[Tile]:
    """The numbers that one looks for first."""
    tiles = [_change_tile(name, values) for name, values in list(scores_of(run).items())[:4]]
    for name, title in (("identical_share", "Answers equal to the ground truth"), ("cut_off_share", "Answers cut off")):
        values = {i: metrics[name] for i, metrics in run.metrics.items() if name in metrics}
        if values:
            tiles.append(_change_tile(title, values, percent=True))
    tiles.append(Tile("Prompts", format_number(run.num_prompts), f"{len(run.chosen_lengths)} times answered"))
    phases = ("seconds_publish", "seconds_evaluate", "seconds_generate", "seconds_score")
    seconds = sum(metrics.get(name, 0) for metrics in run.metrics.values() for name in phases)
    tiles.append(Tile("Time between trainings", format_seconds(seconds), "publish, evaluate, generate, score"))
    return tiles


def _change_tile(name: str, values: dict[int, float], percent: bool = False) -> Tile:
    first, last = min(values), max(values)
    if first == last:
        return Tile(name, format_number(values[last], percent), f"iteration {last}")
    value = f"{format_number(values[first], percent)} → {format_number(values[last], percent)}"
    return Tile(name, value, f"iterations {first} to {last}" if percent else f"{_after(first)} to {_after(last)}")


def _after(iteration: int) -> str:
    return label(iteration) if iteration == 0 else f"after {label(iteration)}"


def format_seconds(seconds: float) -> str:
    """`75` -> `1 min 15 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def remarks_of(run: RunData) -> list[str]:
    """What stands out in the numbers, each with what it means."""
    remarks = []
    nll = scores_of(run).get("nll", {})
    if len(nll) > 1:
        first, last, best = nll[min(nll)], nll[max(nll)], min(nll, key=nll.get)
        verb = "fell" if last < first else "rose"
        remarks.append(
            f"The negative log-likelihood of the held-out ground truth {verb} from {format_number(first)} to "
            f"{format_number(last)} nats per token."
            + (f" It was lowest {_after(best)}: {format_number(nll[best])}." if nll[best] < last else "")
        )
    last = run.metrics[max(run.rejected_lengths)] if run.rejected_lengths else {}
    if last.get("identical_share", 0) > _NEARLY_ALL:
        remarks.append("Nearly all answers equal the ground truth: there is little left to learn from this data.")
    if last.get("cut_off_share", 0) > _SELDOM_ENOUGH:
        remarks.append(
            f"{format_number(last['cut_off_share'], True)} of the last answers ran into `max_completion_length`."
        )
    for iteration, metrics in run.metrics.items():
        if metrics.get("num_collapse_signs", 0) > 0:
            remarks.append(
                f"Sign of collapse {_after(iteration)}: what it is stands in `collapse_signs` of "
                f"`iteration-{iteration}/metrics.json`. Lower `learning_rate`, or add an SFT term."
            )
    steps = [entry["logps/chosen"] for entry in run.log if isinstance(entry.get("logps/chosen"), int | float)]
    if len(steps) > 3 and steps[-1] < steps[0]:
        remarks.append(
            f"The log-probs of the chosen side sank from {format_number(steps[0])} to {format_number(steps[-1])}: see "
            "Troubleshooting in the README if the scores fall too."
        )
    return remarks
