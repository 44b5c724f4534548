"""A few prompts with their ground truth and what every opponent so far answered, to look at while the run goes.

The same prompts in each iteration, so that one sees them change. All completions are in the run directory anyway.
"""

import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from ..run_directory.store import IterationStore
from .rows import RunRows


if TYPE_CHECKING:
    from ..spin_trainer import SPINTrainer

_TRACKERS = ("wandb", "trackio")


@dataclass(frozen=True)
class CompletionSample:
    """
    Args:
        prompt, truth (`str`): Of one row.
        answers (`dict[int, str]`): Iteration -> its opponent's first answer.
    """

    prompt: str
    truth: str
    answers: dict[int, str]


def log_completions(trainer: "SPINTrainer", store: IterationStore, dataset: Dataset, iteration: int) -> None:
    """
    Print the sample, and log it as a table to trackio and Weights & Biases where the run reports to them.

    Called on the main process, when the completions of `iteration` are on disk.

    Args:
        trainer ([`SPINTrainer`]): Has the settings and the tokenizer.
        store ([`IterationStore`]): The run directory.
        dataset ([`~datasets.Dataset`]): With the columns `row`, `prompt_ids` and `chosen_ids`.
        iteration (`int`): The newest one that has been answered.
    """
    args = trainer.args
    samples = sample_completions(
        store, dataset, iteration, trainer.processing_class, args.num_completions_to_print, args.seed
    )
    print_samples(samples, iteration)
    for tracker in _active_trackers(args.report_to):
        tracker.log({"completions": tracker.Table(dataframe=_as_frame(samples, iteration))})


def sample_completions(
    store: IterationStore, dataset: Dataset, iteration: int, tokenizer: Any, num_prompts: int, seed: int
) -> list[CompletionSample]:
    """The first answers of every opponent up to `iteration` to prompts that the seed chooses."""
    chosen = random.Random(seed).sample(range(len(dataset)), min(num_prompts, len(dataset)))
    prompts = [dataset[position] for position in sorted(chosen)]
    rows = np.array([prompt["row"] for prompt in prompts])
    answers: dict[int, dict[int, str]] = {prompt["row"]: {} for prompt in prompts}
    for number in range(iteration + 1):
        for table in RunRows(store.output_dir).completions(number, ["sample", "completion_ids"], rows):
            for answer in table.to_pylist():
                if answer["sample"] == 0:
                    text = tokenizer.decode(answer["completion_ids"], skip_special_tokens=True)
                    answers[answer["row"]][number] = text
    return [
        CompletionSample(
            tokenizer.decode(prompt["prompt_ids"], skip_special_tokens=False),
            tokenizer.decode(prompt["chosen_ids"], skip_special_tokens=True),
            answers[prompt["row"]],
        )
        for prompt in prompts
    ]


def print_samples(samples: list[CompletionSample], iteration: int) -> None:
    """A table on a terminal, plain lines elsewhere, above a progress bar if there is one."""
    with tqdm.external_write_mode(file=sys.stdout):
        if sys.stdout.isatty():
            Console().print(_as_table(samples, iteration))
        else:
            print("\n".join(_as_lines(samples, iteration)), flush=True)


def _as_table(samples: list[CompletionSample], iteration: int) -> Table:
    table = Table(title=f"Completions of iteration {iteration}", expand=True, show_lines=True)
    for name, style in (("Prompt", ""), ("Ground truth", "green")):
        table.add_column(name, style=style, overflow="fold")
    for number in range(iteration + 1):
        table.add_column(f"Iteration {number}", style="yellow" if number == iteration else "dim", overflow="fold")
    for sample in samples:
        answers = [sample.answers.get(number, "") for number in range(iteration + 1)]
        table.add_row(*(Text(cell) for cell in (sample.prompt, sample.truth, *answers)))  # no markup from data
    return table


def _as_lines(samples: list[CompletionSample], iteration: int) -> list[str]:
    lines = [f"Completions of iteration {iteration}:"]
    for sample in samples:
        lines += [f"  prompt        {sample.prompt!r}", f"  ground truth  {sample.truth!r}"]
        lines += [f"  iteration {number:<3} {answer!r}" for number, answer in sample.answers.items()]
        lines.append("")
    return lines[:-1]


def _active_trackers(report_to: list[str]) -> list[Any]:
    """The modules of the trackers that take tables, as GRPOTrainer chooses them."""
    trackers = [import_module(name) for name in _TRACKERS if name in report_to]
    return [tracker for tracker in trackers if tracker.__name__ != "wandb" or tracker.run is not None]


def _as_frame(samples: list[CompletionSample], iteration: int) -> Any:
    import pandas

    rows: list[Mapping[str, Any]] = [
        {
            "iteration": iteration,
            "prompt": sample.prompt,
            "ground_truth": sample.truth,
            **{f"iteration_{number}": sample.answers.get(number, "") for number in range(iteration + 1)},
        }
        for sample in samples
    ]
    return pandas.DataFrame(rows)
