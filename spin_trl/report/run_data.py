"""Everything that a page shows of a run, read from its directory. Knows nothing of HTML.

What is not there yet, or damaged, is left out, with a line in `problems` that says what.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .decoding import Decode, find_decoder, messages_of
from .rows import RunRows


class NotARunError(ValueError):
    """There is no self-play run in a directory: the message says what was expected."""


@dataclass
class Sample:
    """
    Prompts with their ground truth and what each iteration's opponent answered.

    Args:
        prompts (`list[dict]`): Each with `row`, `source_row`, `prompt` (pairs of role and text), `truth`, and
            `answers`: iteration -> list of `{"text", "cut_off"}`.
        num_prompts (`int`): How many prompts the run has.
    """

    prompts: list[dict[str, Any]] = field(default_factory=list)
    num_prompts: int = 0


@dataclass
class RunData:
    """
    Args:
        directory (`Path`): The run directory.
        description (`dict`): `self_play.json`.
        metrics (`dict[int, dict[str, float]]`): Iteration -> every number of `metrics.json`; names of nested ones are
            joined by "/".
        log (`list[dict]`): What was logged, in order.
        chosen_lengths, rejected_lengths (`dict[int, np.ndarray]`): Iteration -> how many sides have 0, 1, 2,
            ... tokens.
        sample ([`Sample`]): The completions to look at.
        problems (`list[str]`): What could not be read.
    """

    directory: Path
    description: dict[str, Any] = field(default_factory=dict)
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    chosen_lengths: dict[int, np.ndarray] = field(default_factory=dict)
    rejected_lengths: dict[int, np.ndarray] = field(default_factory=dict)
    sample: Sample = field(default_factory=Sample)
    problems: list[str] = field(default_factory=list)

    @property
    def config(self) -> dict[str, Any]:
        config = self.description.get("config")
        return config if isinstance(config, dict) else {}

    @property
    def is_finished(self) -> bool:
        return bool(self.description.get("finished"))

    @property
    def num_iterations(self) -> int | None:
        number = self.config.get("num_iterations")
        return number if isinstance(number, int) else None


def read_run(directory: str | Path, max_prompts: int = 2000, seed: int = 0) -> RunData:
    """
    Args:
        directory (`str` or `Path`): The run directory.
        max_prompts (`int`): How many prompts are sampled to be looked at.
        seed (`int`): Of that sample.

    Raises:
        [`NotARunError`]: if there is no run.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise NotARunError(f"{directory} is no directory. Give the `output_dir` of a self-play run.")
    rows = RunRows(directory)
    if not (directory / "self_play.json").exists() and not rows.iterations():
        raise NotARunError(
            f"{directory} holds no self-play run: neither self_play.json nor iteration-0. Give the `output_dir` of one."
        )
    run = RunData(directory, problems=rows.problems)
    run.description = _read_object(run, "self_play.json")
    for iteration in rows.iterations():
        run.metrics[iteration] = dict(_numbers(_read_object(run, f"iteration-{iteration}/metrics.json")))
    run.log = _read_log(run)
    decode, line = find_decoder(directory, run.description.get("model"))
    if line is not None:
        run.problems.append(line)
    _read_rows(run, rows, decode, max_prompts, seed)
    _note_missing(run, rows)
    return run


def _read_object(run: RunData, name: str) -> dict[str, Any]:
    path = run.directory / name
    try:
        value = json.loads(path.read_text())
        if isinstance(value, dict):
            return value
        reason = "it holds no JSON object"
    except FileNotFoundError:
        reason = "it is not there (yet)"
    except (OSError, ValueError) as error:
        reason = f"it cannot be read ({error})"
    run.problems.append(f"{name} is left out: {reason}.")
    return {}


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number in nested objects and lists, with its path as name."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}/{key}" if name else str(key))
    elif isinstance(value, list):
        for position, inner in enumerate(value):
            yield from _numbers(inner, f"{name}[{position}]")
    elif math.isfinite(value):
        yield name, value


# The log


def _read_log(run: RunData) -> list[dict[str, Any]]:
    """What the run writes as it goes, or, where it does not, the history in the newest checkpoint."""
    path = run.directory / "log.jsonl"
    if path.exists():
        return _read_log_lines(run, path)
    checkpoints = [path for path in run.directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for checkpoint in sorted(checkpoints, key=lambda path: int(path.name.partition("-")[2]), reverse=True):
        try:
            history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
            return [entry for entry in history if isinstance(entry, dict)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            run.problems.append(f"{checkpoint.name}/trainer_state.json is left out: {type(error).__name__}: {error}")
    run.problems.append("There is no log of the training steps: neither log.jsonl nor a checkpoint.")
    return []


def _read_log_lines(run: RunData, path: Path) -> list[dict[str, Any]]:
    entries, num_broken = [], 0
    with path.open(errors="replace") as lines:
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            if isinstance(entry, dict):
                entries.append(entry)
            else:
                num_broken += 1
    if num_broken:
        run.problems.append(f"{num_broken} line(s) of log.jsonl are left out: they are half-written or damaged.")
    return entries


# Prompts and completions


def _read_rows(run: RunData, rows: RunRows, decode: Decode, max_prompts: int, seed: int) -> None:
    truth_lengths = _truth_lengths(rows)
    answered = {i: _answered_rows(rows, i) for i in rows.iterations() if rows.has_completions(i)}
    numbers = sorted(set(truth_lengths).union(*answered.values()))
    sampled = _sample(numbers, max_prompts, seed)
    prompts = _read_prompts(rows, decode, sampled)
    for iteration, found in answered.items():
        if found:
            known = [truth_lengths[row] for row in found if row in truth_lengths]
            run.chosen_lengths[iteration] = _add_counts(np.zeros(1, np.int64), np.array(known, np.int64))
            run.rejected_lengths[iteration] = _read_answers(rows, decode, iteration, prompts)
    run.sample = Sample(list(prompts.values()), len(numbers))


def _answered_rows(rows: RunRows, iteration: int) -> set[int]:
    return {row for table in rows.completions(iteration, ["row"]) for row in table["row"].to_pylist()}


def _truth_lengths(rows: RunRows) -> dict[int, int]:
    lengths = {}
    for table in rows.truths(["chosen_ids"]):
        lengths.update(
            zip(table["row"].to_pylist(), pc.list_value_length(table["chosen_ids"]).to_pylist(), strict=True)
        )
    return lengths


def _add_counts(counts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    more = np.bincount(lengths) if len(lengths) else np.zeros(1, np.int64)
    total = np.zeros(max(len(counts), len(more)), np.int64)
    total[: len(counts)] += counts
    total[: len(more)] += more
    return total


def _sample(rows: list[int], size: int, seed: int) -> np.ndarray:
    rows = np.array(rows, np.int64)
    if len(rows) <= size:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, size, replace=False))


def _read_prompts(rows: RunRows, decode: Decode, sampled: np.ndarray) -> dict[int, dict[str, Any]]:
    prompts = {row: {"row": row, "prompt": [], "truth": None, "answers": {}} for row in sampled.tolist()}
    for table in rows.truths(["source_row", "prompt", "prompt_ids", "chosen_ids"], sampled):
        for row in table.to_pylist():
            prompts[row["row"]] |= {
                "source_row": row.get("source_row"),
                "prompt": messages_of(row["prompt"]) if row.get("prompt") else [("", decode(row["prompt_ids"], False))],
                "truth": decode(row["chosen_ids"], True),
            }
    return prompts


def _read_answers(rows: RunRows, decode: Decode, iteration: int, prompts: dict[int, dict[str, Any]]) -> np.ndarray:
    """Add an iteration's answers to the prompts that are shown. Returns how many of all answers have each length."""
    counts, shown = np.zeros(1, np.int64), pa.array(list(prompts), pa.int64())
    for table in rows.completions(iteration, ["sample", "completion_ids", "finish_reason"]):
        counts = _add_counts(counts, pc.list_value_length(table["completion_ids"]).to_numpy())
        for row in table.filter(pc.is_in(table["row"], shown)).sort_by("sample").to_pylist():
            answer = {"text": decode(row["completion_ids"], True), "cut_off": row["finish_reason"] == "length"}
            prompts[row["row"]]["answers"].setdefault(iteration, []).append(answer)
    return counts


def _note_missing(run: RunData, rows: RunRows) -> None:
    """Say what a run that goes on, or was stopped, has not come to."""
    for iteration in rows.iterations():
        is_final = run.num_iterations is not None and iteration >= run.num_iterations
        if not rows.has_completions(iteration) and not is_final:
            run.problems.append(f"Iteration {iteration} has no completions (yet).")
    num_unknown = sum(prompt["truth"] is None for prompt in run.sample.prompts)
    if num_unknown:
        run.problems.append(
            f"{num_unknown} of the prompts shown are not among the run's data (`train_data/`): their ground truth is "
            "missing."
        )
