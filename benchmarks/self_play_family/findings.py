"""What the runs that are over have found, task by task, read back from their results. Knows nothing of Markdown."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoTokenizer

from .answers import completion_ids
from .measures import distinct_n
from .methods import METHODS, Method, Setting
from .runs import START, Run
from .task import Task
from .tasks import TASKS, get_task


SEARCH_SEED = 0  # none of those that the chosen settings are run with
Scores = dict[str, float]


@dataclass(frozen=True)
class Tried:
    """
    Args:
        setting (`Setting`): What was tried.
        score (`float`, *optional*): On the validation part, after the last iteration. `None` where the loss stopped
            being a number.
    """

    setting: Setting
    score: float | None


def best(tried: Sequence[Tried], greater_is_better: bool) -> Setting:
    """
    The setting with the best score; of equal ones the first.

    Raises:
        `ValueError`: if none has a score.
    """
    scored = [t for t in tried if t.score is not None and math.isfinite(t.score)]
    if not scored:
        raise ValueError(f"None of {len(tried)} settings has a score: {[t.setting for t in tried]}.")
    choose = max if greater_is_better else min
    return choose(scored, key=lambda t: t.score).setting


def at_the_edge(setting: Setting, tried: Sequence[Tried]) -> bool:
    """Whether its learning rate is the smallest or greatest that was tried: beyond it there may be a better one."""
    rates = [t.setting["learning_rate"] for t in tried]
    return setting["learning_rate"] in (min(rates), max(rates))


@dataclass
class Findings:
    """
    Args:
        task ([`Task`]): What was learned.
        start (`dict[str, float]`): The measures of the model that all start from, on the test part.
        validation_start (`float`): Its score on the part that the settings are searched on.
        truths (`dict[str, float]`): Distinct-n of the test part's ground truths.
        tried, chosen, runs (`dict`):
            By the method's title: the settings of the search, the best of them, and for each seed the measures after
            each iteration.
        diverged (`list[str]`): Which runs on the test part ended because the loss was no number.
        seconds (`list[float]`): Of each run.
    """

    task: Task
    start: Scores
    validation_start: float
    truths: Scores
    tried: dict[str, list[Tried]] = field(default_factory=dict)
    chosen: dict[str, Setting] = field(default_factory=dict)
    runs: dict[str, list[list[Scores]]] = field(default_factory=dict)
    diverged: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def values(self, name: str) -> dict[str, list[list[float]]]:
        """One measure of all runs."""
        return {title: [[s[name] for s in one] for one in seeds] for title, seeds in self.runs.items()}


def start_runs(root: Path, task: str, is_quick: bool) -> list[Run]:
    """Of the model that all start from, on the test part and on the validation part."""
    return [Run(root, task, START, {}, SEARCH_SEED, part, is_quick) for part in ("test", "validation")]


def search_runs(root: Path, task: Task, method: Method, is_quick: bool) -> list[Run]:
    settings = method.settings(task.learning_rates)[: 1 if is_quick else None]
    return [Run(root, task.name, method.name, setting, SEARCH_SEED, "validation", is_quick) for setting in settings]


def chosen_runs(root: Path, task: Task, method: Method, seeds: Sequence[int], is_quick: bool) -> list[Run]:
    """Of the setting that the search found: it has to be over."""
    setting = best(tried_settings(search_runs(root, task, method, is_quick)), task.greater_is_better)
    return [Run(root, task.name, method.name, setting, seed, "test", is_quick) for seed in seeds]


def tried_settings(runs: Sequence[Run]) -> list[Tried]:
    results = [run.result() for run in runs]
    return [
        Tried(run.setting, result["scores"][-1]["score"] if result["scores"] else None)
        for run, result in zip(runs, results, strict=True)
    ]


def collect(root: Path, seeds: Sequence[int], is_quick: bool) -> list[Findings]:
    """Of every task the methods whose runs are all over, whether they were asked for this time or not."""
    found = []
    for name in TASKS:
        starts = start_runs(root, name, is_quick)
        if starts[0].start.is_dir() and all(run.result() for run in starts):
            findings = _begin(get_task(name, is_quick), *starts)
            for method in METHODS.values():
                _add(findings, root, method, seeds, is_quick)
            if findings.runs:
                found.append(findings)
    return found


def _begin(task: Task, test: Run, validation: Run) -> Findings:
    tokenizer = AutoTokenizer.from_pretrained(test.start)
    truths = [completion_ids(tokenizer, row["prompt"], row["completion"]) for row in task.rows()["test"]]
    (start,), (searched,) = test.result()["scores"], validation.result()["scores"]
    return Findings(task, start, searched["score"], distinct_n(truths))


def _add(findings: Findings, root: Path, method: Method, seeds: Sequence[int], is_quick: bool) -> None:
    searched = search_runs(root, findings.task, method, is_quick)
    if not all(run.result() for run in searched):
        return
    tested = chosen_runs(root, findings.task, method, seeds, is_quick)
    results = [run.result() for run in tested]
    if not all(results):
        return
    findings.tried[method.title] = tried_settings(searched)
    findings.chosen[method.title] = tested[0].setting
    scores = [result["scores"] for result in results if result["scores"]]
    if scores:
        findings.runs[method.title] = scores
    findings.diverged += [f"{method.title}, seed {r['seed']}" for r in results if not r["scores"]]
    findings.seconds += [result["seconds"] for result in [*results, *(run.result() for run in searched)]]
