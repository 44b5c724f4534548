"""`benchmarks/quality.md`: the tables of all tasks, under a paragraph that is written by hand and kept."""

import re
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path

from .findings import Findings, at_the_edge
from .methods import METHODS
from .picture import Panel, draw
from .tables import by_iteration, of_settings


_BEGIN, _END = "<!-- what to choose: written by hand, kept when the tables are -->", "<!-- until here -->"
TO_FILL_IN = "**To be filled in from the tables below: what to choose, and when.**"
# name of the measure -> its heading, digits
_MEASURES = {
    "nll": ("Negative log-likelihood of the ground truths, nats per token (lower is better)", 3),
    "distinct_1": ("Distinct-1 of answers sampled at temperature 1; of the ground truths {:.4f}", 4),
    "distinct_2": ("Distinct-2 of the same; of the ground truths {:.4f}", 4),
}
_HOW = """\
Every method starts from the same SFT model, sees the same prompts and ground truths, and takes the same number of
gradient steps of the same batch size; generation is not counted. For each task and method six settings are searched
with one seed on the validation part: six learning rates for further SFT, three learning rates times two values for the
others, of `beta`, or of what plays its part (`space_mu`, `t_spin_alpha`). The best one after the last iteration is run
over {num_seeds} other seeds ({seeds}), and only these runs are measured on the test part: mean ± standard deviation.
Self-play has {iterations} iterations of {epochs} epoch(s) without history, linear decay with 10 % warm-up and a fresh
AdamW in each; further SFT has one such schedule over all its steps, so that only the last iteration is the end of both.
Pairs whose two sides are equal are kept, so that all iterations have as many steps: a loss of the sides' difference
(SPIN, alpha-SPIN) learns nothing from them, the others do. alpha-SPIN's mixture is half opponent, half start. One
start, one validation and one test part a task: the deviations are over seeds alone, and differences of a few words are
noise.
These are small models on small tasks: what holds here need not hold for yours."""


def write_report(findings: Sequence[Findings], seeds: Sequence[int], path: Path, where: str) -> None:
    """
    Write the document and, beside it, its picture.

    Args:
        where (`str`): Date and machine.
    """
    picture = path.with_suffix(".png")
    panels = [Panel(f.task.title, f.task.score_name, f.start["score"], f.values("score")) for f in findings]
    draw(panels, [method.title for method in METHODS.values()], picture)
    kept = paragraph_to_keep(path.read_text() if path.is_file() else "")
    path.write_text(document(findings, seeds, kept, picture.name, where))


def paragraph_to_keep(text: str) -> str:
    """What stands between the marks, or, where there are none, a place to fill in."""
    found = re.search(f"{re.escape(_BEGIN)}\n(.*?)\n{re.escape(_END)}", text, re.DOTALL)
    return found[1] if found else TO_FILL_IN


def document(findings: Sequence[Findings], seeds: Sequence[int], kept: str, picture: str, where: str) -> str:
    task = findings[0].task
    how = _HOW.format(
        num_seeds=len(seeds),
        seeds=", ".join(map(str, seeds)),
        iterations=task.num_iterations,
        epochs=task.epochs_per_iteration,
    )
    num_runs, hours = sum(len(f.seconds) for f in findings), sum(sum(f.seconds) for f in findings) / 3600
    parts = [
        "# Which method of the self-play family",
        f"{_BEGIN}\n{kept}\n{_END}",
        f"![Scores by iteration]({picture})",
        textwrap.fill(how, 120),
        f"{where}; {num_runs} runs, {hours:.1f} hours of one core. Made by `make bench-quality`.",
        *(_section(f) for f in findings),
    ]
    return "\n\n".join(parts) + "\n"


def _section(findings: Findings) -> str:
    task = findings.task
    num_steps = task.steps_per_iteration(len(task.rows()["train"])) * task.num_iterations
    seconds = statistics.mean(findings.seconds)
    steps = f"{num_steps} gradient steps of {task.batch_size} rows; a run took {seconds:.0f} s."
    parts = [f"## {task.title}", textwrap.fill(f"{task.about} {steps}", 120)]
    score = task.score_name[0].upper() + task.score_name[1:]
    parts += [f"{score}:", by_iteration(findings.start["score"], findings.values("score"), task.digits)]
    for name, (heading, digits) in _MEASURES.items():
        heading = heading.format(findings.truths.get(name))
        parts += [f"{heading}:", by_iteration(findings.start[name], findings.values(name), digits)]
    before = f"{findings.validation_start:.{task.digits}f}"
    parts += [
        f"Settings searched (learning rate, and the other field), the chosen one in bold; the start has {before}:",
        of_settings(findings.tried, findings.chosen, task.digits),
    ]
    edges = [t for t, setting in findings.chosen.items() if at_the_edge(setting, findings.tried[t])]
    if edges:
        parts.append(f"Chosen at an end of the learning rates, so perhaps not at its best: {', '.join(edges)}.")
    if findings.diverged:
        parts.append(f"Runs whose loss stopped being a number, left out: {'; '.join(findings.diverged)}.")
    return "\n\n".join(parts)
