"""What the demo gives, over several seeds, next to further SFT with the same number of gradient steps.

    make bench-demo [ARGS="--seeds 42 1 2"]

Plays `recipes/pronunciation.yaml` once per seed, and trains the same starting model with `recipes/pronunciation_sft.py`
on the same 1,000 words for as many steps of the same batch size. Prints a Markdown table and writes JSON. Everything is
measured on the 1,000 words of `accent_test.jsonl`, answered greedily. About 15 minutes on two CPU cores.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from measure import (
    RECIPES,
    ROOT,
    flags,
    make_untrained_start,
    parse,
    parser,
    read_metrics,
    run_script,
    write_demo_config,
    write_result,
)
from self_play_family.answers import answer_in_text, completion_ids, logps
from self_play_family.supervised import load
from self_play_family.tables import markdown, mean_and_deviation


sys.path.insert(0, str(RECIPES))  # recipes are scripts, not a package

from pronunciation_metrics import compute_generation_metrics  # noqa: E402


DATA = RECIPES / "data" / "pronunciation"
START = ROOT / "runs" / "pronunciation" / "sft"
SFT_LEARNING_RATES = ("3e-5", "3e-4")  # that of the demo, and the best known for SFT on these words
MEASURES = {"word_accuracy": "words right, %", "phone_error_rate": "phone error rate, %", "nll": "nats per token"}
Scores = dict[str, float]


def play_spin(seed: int, start: Path, test_file: Path, folder: Path, is_quick: bool) -> tuple[list[Scores], int]:
    """The scores at the start and after each iteration, and the number of gradient steps."""
    config = folder.with_suffix(".yaml")
    changes = {"model_name_or_path": str(start), "eval_file": str(test_file), "output_dir": str(folder), "seed": seed}
    if is_quick:
        changes |= {"use_vllm": False, "num_iterations": 1, "max_completion_length": 4, "train_file": str(test_file)}
    write_demo_config(config, [], **changes, overwrite_output_dir=True)
    run_script("recipes/spin.py", "--config", config, "--disable_tqdm", "true", is_quick=is_quick)
    metrics = read_metrics(folder)
    config = json.loads((folder / "self_play.json").read_text())["config"]
    batches = [math.ceil(m["num_training_pairs"] / config["per_device_train_batch_size"]) for m in metrics[:-1]]
    return [m["evaluation"] for m in metrics], sum(batches) * config["epochs_per_iteration"]


def train_further(
    seed: int, learning_rate: str, num_steps: int, start: Path, test_file: Path, folder: Path, is_quick: bool
) -> Scores:
    """The scores of the starting model after more SFT."""
    arguments = flags(
        init_from=start,
        train_file=DATA / "accent_train.jsonl",
        output_dir=folder,
        overwrite="true",
        evaluate="false",
        seed=seed,
        max_steps=num_steps,
        learning_rate=learning_rate,
        per_device_train_batch_size=32,
        warmup_steps=0.1,
        disable_tqdm="true",
    )
    run_script("recipes/pronunciation_sft.py", *arguments, is_quick=is_quick, launch=False)
    return score(folder, test_file)


@torch.no_grad()
def score(folder: Path, test_file: Path) -> Scores:
    """The demo's measures of a model in a folder."""
    model, tokenizer = load(folder)
    model.eval()
    rows = [json.loads(line) for line in test_file.read_text().splitlines()]
    prompts, references = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    truths = [completion_ids(tokenizer, row["prompt"], row["completion"]) for row in rows]
    nats = -sum(logps(model, tokenizer(prompts)["input_ids"], truths))
    answers = answer_in_text(model, tokenizer, prompts, max_new_tokens=40)
    metrics = compute_generation_metrics(prompts, references, answers)
    return {**metrics, "nll": nats / sum(len(truth) for truth in truths)}


def table(rows: dict[str, list[Scores]]) -> str:
    """Markdown: mean and sample standard deviation over the seeds."""

    def cell(name: str, scores: list[Scores]) -> str:
        factor, digits = (1, 3) if name == "nll" else (100, 1)
        return mean_and_deviation([factor * one[name] for one in scores], digits)

    cells = [[label, *(cell(name, scores) for name in MEASURES)] for label, scores in rows.items()]
    return markdown(["", *MEASURES.values()], cells)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    options = parse(arguments)
    folder = options.output / "pronunciation"
    folder.mkdir(exist_ok=True)
    start, test_file, learning_rates = START, DATA / "accent_test.jsonl", SFT_LEARNING_RATES
    if options.quick:
        make_toys(folder, options)
        start, test_file, learning_rates = folder / "start", folder / "test.jsonl", SFT_LEARNING_RATES[:1]
    elif not start.is_dir():
        raise SystemExit(f"{start} is missing: make it with `python recipes/pronunciation_sft.py` (or `make demo`).")

    rows: dict[str, list[Scores]] = {}
    for seed in options.seeds:
        spin, num_steps = play_spin(seed, start, test_file, folder / f"spin-{seed}", options.quick)
        for i, scores in enumerate(spin):
            rows.setdefault("start" if i == 0 else f"SPIN, after iteration {i - 1}", []).append(scores)
        for learning_rate in learning_rates:
            trained = folder / f"sft-{learning_rate}-{seed}"
            scores = train_further(seed, learning_rate, num_steps, start, test_file, trained, options.quick)
            rows.setdefault(f"further SFT, {num_steps} steps at {learning_rate}", []).append(scores)
        print(f"seed {seed} done", flush=True)
    rows = dict(sorted(rows.items(), key=lambda item: item[0].startswith("further")))  # SPIN's rows first
    print(table(rows))
    write_result(options, "pronunciation", {"seeds": options.seeds, "rows": rows})


def make_toys(folder: Path, options: argparse.Namespace) -> None:
    """An untrained model, a few words, and one seed."""
    make_untrained_start(folder / "start")
    lines = (DATA / "accent_test.jsonl").read_text().splitlines(keepends=True)
    (folder / "test.jsonl").write_text("".join(lines[:8]))
    options.seeds = options.seeds[:1]


if __name__ == "__main__":
    main()
