"""Everything that a page shows of a run, read from its directory with Arrow alone. Knows nothing of HTML.

The run may be going on: what it writes is whole as soon as it has its name. What is not there yet, or damaged, is left
out, with a line in `problems` that says what.
"""

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.columns import joined, lengths_of
from ..run_directory.completion_parts import CompletionParts
from ..run_directory.run_paths import RunDirectoryError, numbered
from .decoding import Decode, find_decoder, messages_of


@dataclass
class RunData:
    """
    Args:
        description (`dict`): `self_play.json`.
        metrics (`dict[int, dict[str, float]]`): Iteration -> every number of `metrics.json`; names of nested ones are
            joined by "/".
        log (`list[dict]`): What was logged, in order.
        chosen_lengths, rejected_lengths (`dict[int, np.ndarray]`): Iteration -> number of sides of 0, 1, 2, ... tokens.
        prompts (`list[dict]`): Those to look at, each with `row`, `source_row`, `prompt` (pairs of role and text),
            `truth`, and `answers`: iteration -> list of `{"text", "cut_off"}`.
        num_prompts (`int`): Of the whole run.
        problems (`list[str]`): What could not be read.
    """

    directory: Path
    description: dict[str, Any] = field(default_factory=dict)
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    chosen_lengths: dict[int, np.ndarray] = field(default_factory=dict)
    rejected_lengths: dict[int, np.ndarray] = field(default_factory=dict)
    prompts: list[dict[str, Any]] = field(default_factory=list)
    num_prompts: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def config(self) -> dict[str, Any]:
        return self.description.get("config", {})

    @property
    def num_iterations(self) -> int | None:
        return self.config.get("num_iterations")

    def leave_out(self, name: str | Path, reason: str) -> None:
        line = f"{name} is left out: {reason}"
        if line not in self.problems:
            self.problems.append(line)


def read_run(directory: str | Path, max_prompts: int = 2000, seed: int = 0) -> RunData:
    """
    Read a run, with `max_prompts` of its prompts, which `seed` chooses, to be looked at.

    Raises:
        [`RunDirectoryError`]: if there is no run.
    """
    run = RunData(Path(directory))
    if not run.directory.is_dir():
        raise RunDirectoryError(f"{directory} is no directory. Give the `output_dir` of a self-play run.")
    iterations = list(numbered(run.directory, "iteration"))
    if not (run.directory / "self_play.json").exists() and not iterations:
        raise RunDirectoryError(
            f"{directory} holds no self-play run: neither self_play.json nor iteration-0. Give the `output_dir` of one."
        )
    run.description = _read_object(run, "self_play.json")
    for iteration in iterations:
        run.metrics[iteration] = dict(_numbers(_read_object(run, f"iteration-{iteration}/metrics.json")))
    run.log = _read_log(run)
    _read_rows(run, find_decoder(run.directory, run.description.get("model")), max_prompts, seed)
    return run


def _read_object(run: RunData, name: str) -> dict[str, Any]:
    try:
        return dict(json.loads((run.directory / name).read_text()))
    except (OSError, ValueError, TypeError) as error:
        run.leave_out(name, f"it cannot be read, or not yet ({error}).")
        return {}


def is_number(value: Any) -> bool:
    """Whether it can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number in nested objects, with its path as name."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        elif is_number(value):
            yield prefix + name, value


def _read_log(run: RunData) -> list[dict[str, Any]]:
    try:
        lines = (run.directory / "log.jsonl").read_text(errors="replace").splitlines()
    except OSError as error:
        run.leave_out("log.jsonl", f"it cannot be read, or not yet ({error}).")
        return []
    entries = []
    for line in lines:
        with suppress(ValueError, TypeError):
            entries.append(dict(json.loads(line)))
    if num_broken := len(lines) - len(entries):
        run.leave_out("log.jsonl, in part,", f"{num_broken} line(s) are half-written or damaged.")
    return entries


# Prompts and completions


def _read_rows(run: RunData, decode: Decode | None, max_prompts: int, seed: int) -> None:
    if decode is None:
        decode = _show_ids
        run.problems.append(
            "No tokenizer.json is found in the run directory, nor that of the model without a network: token ids are "
            "shown."
        )
    truth_lengths = {}
    for table in _truths(run, ["row", "chosen_ids"]):
        truth_lengths |= zip(table["row"].to_pylist(), lengths_of(table["chosen_ids"]).tolist(), strict=True)
    run.num_prompts = len(truth_lengths)
    rows = np.array(sorted(truth_lengths), np.int64)
    if len(rows) > max_prompts:
        rows = np.sort(np.random.default_rng(seed).choice(rows, max_prompts, replace=False))
    shown = {row: {"row": row, "answers": {}} for row in rows.tolist()}
    for table in _truths(run, ["row", "source_row", "prompt", "chosen_ids"]):
        for row in _only(table, shown):
            prompt, truth = messages_of(row["prompt"]), decode(row["chosen_ids"])
            shown[row["row"]] |= {"source_row": row["source_row"], "prompt": prompt, "truth": truth}
    run.prompts = list(shown.values())
    for iteration in run.metrics:
        _read_answers(run, decode, iteration, shown, truth_lengths)


def _read_answers(
    run: RunData, decode: Decode, iteration: int, shown: dict[int, dict[str, Any]], truth_lengths: dict[int, int]
) -> None:
    """Count how many sides of an iteration have each length, and add its answers to the prompts that are shown."""
    answered, lengths = set(), []
    for table in _answers(run, iteration):
        answered.update(table["row"].to_pylist())
        lengths.append(lengths_of(table["completion_ids"]))
        for row in _only(table.sort_by("sample"), shown):
            answer = {"text": decode(row["completion_ids"]), "cut_off": row["finish_reason"] == "length"}
            shown[row["row"]]["answers"].setdefault(iteration, []).append(answer)
    if lengths:
        known = [truth_lengths[row] for row in answered if row in truth_lengths]
        run.chosen_lengths[iteration] = np.bincount(known, minlength=1)
        run.rejected_lengths[iteration] = np.bincount(joined(lengths), minlength=1)
    elif run.num_iterations is None or iteration < run.num_iterations:
        run.problems.append(f"Iteration {iteration} has no completions (yet).")


def _truths(run: RunData, columns: list[str]) -> Iterator[pa.Table]:
    """What the run trains on, batch by batch."""
    for path in sorted((run.directory / "train_data").glob("*.arrow")):
        try:
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
                for batch in reader:
                    yield pa.Table.from_batches([batch]).select(columns)
        except (OSError, ValueError, pa.ArrowException) as error:
            run.leave_out(path.relative_to(run.directory), str(error))


def _answers(run: RunData, iteration: int) -> Iterator[pa.Table]:
    """The opponent's completions, part by part."""
    parts = CompletionParts(run.directory / f"iteration-{iteration}" / "generations", origin={})
    for path in parts.paths():
        try:
            yield parts.read(path, ["row", "sample", "completion_ids", "finish_reason"])
        except (OSError, ValueError, RunDirectoryError, pa.ArrowException) as error:
            run.leave_out(path.relative_to(run.directory), str(error))


def _only(table: pa.Table, rows: dict[int, Any]) -> list[dict[str, Any]]:
    return table.filter(pc.is_in(table["row"], pa.array(list(rows), pa.int64()))).to_pylist()


def _show_ids(ids: list[int]) -> str:
    return " ".join(map(str, ids))
