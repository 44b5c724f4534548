"""The main charts of a run as PNG files, for a model card. Needs matplotlib, the extra `report`."""

from pathlib import Path

from ..evaluation.metric_names import label
from .run_data import RunData
from .summary import scores_of


_CHOSEN, _REJECTED, _ACCENT = "#0b6a6a", "#ad4a17", "#3f4fb0"  # as on the page


def write_pictures(run: RunData, folder: Path, wanted: bool | None = None) -> list[Path]:
    """
    Args:
        run ([`RunData`]): The run.
        folder (`Path`): Where they go: `scores.png`, `rewards.png` and `lengths.png`, those for which there is data.
        wanted (`bool`, *optional*): By default where matplotlib is installed.

    Raises:
        `ImportError`: if they are wanted and matplotlib is missing.
    """
    if wanted is False:
        return []
    try:
        from matplotlib.figure import Figure  # without pyplot: no window, no state
    except ImportError:
        if wanted is None:
            return []
        raise ImportError("Pictures need matplotlib, which is not installed: pip install 'spin_trl[report]'.") from None
    written = []
    for name, draw in (("scores", _scores), ("rewards", _rewards), ("lengths", _lengths)):
        figure = Figure(layout="constrained", dpi=144)
        if draw(run, figure):
            folder.mkdir(parents=True, exist_ok=True)
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], metadata={"Software": None})
    return written


def _scores(run: RunData, figure) -> bool:
    scores = scores_of(run)
    for axes, (name, values) in zip(_row(figure, len(scores)), scores.items(), strict=True):
        names = [label(i).removeprefix("iteration ") for i in sorted(values)]
        axes.plot(names, [values[i] for i in sorted(values)], marker="o", color=_ACCENT)
        axes.set(title=name, xlabel="after iteration", ylabel="nats per token" if name == "nll" else "")
    return bool(scores)


def _rewards(run: RunData, figure) -> bool:
    (axes,) = _row(figure, 1)
    for name, colour, style in (("rewards/chosen", _CHOSEN, "-"), ("rewards/rejected", _REJECTED, "--")):
        entries = [entry for entry in run.log if name in entry and "step" in entry]
        axes.plot([e["step"] for e in entries], [e[name] for e in entries], style, color=colour, label=name)
    axes.set(xlabel="step", ylabel="reward")
    axes.legend(frameon=False)
    return any("rewards/chosen" in entry for entry in run.log)


def _lengths(run: RunData, figure) -> bool:
    all_axes = _row(figure, len(run.rejected_lengths))
    for axes, (iteration, rejected) in zip(all_axes, run.rejected_lengths.items(), strict=True):
        axes.stairs(run.chosen_lengths[iteration], color=_CHOSEN, label="chosen")
        axes.stairs(rejected, color=_REJECTED, label="rejected", linestyle="--")
        axes.set(title=f"iteration {iteration}", xlabel="tokens", ylabel="answers")
        axes.legend(frameon=False)
    return bool(run.rejected_lengths)


def _row(figure, number: int) -> list:
    """So many pairs of axes beside each other."""
    figure.set_size_inches(max(6, 4 * number), 3)
    return [figure.add_subplot(1, number, place + 1) for place in range(number)]
