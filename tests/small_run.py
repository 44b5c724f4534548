"""Run directories made by hand, through `IterationStore`, for what reads them. A byte is a token: any text will do."""

import json
from pathlib import Path

from datasets import Dataset
from tiny_tokenizers import byte_tokenizer

from spin_trl.run_directory.store import IterationStore


RUN = "0a1b2c3d"
CONFIG = {"num_iterations": 2, "epochs_per_iteration": 1, "beta": 0.1, "learning_rate": 5e-7}
GAMES = [("The capital of France?", "It is Paris."), ("2 + 2?", "It is 4.")]
ANSWERS = {0: ["It is London.", "It is 4."], 1: ["It is Paris.", "It is 4."]}


def write_run(
    directory: Path,
    games: list[tuple[str, str]] = GAMES,
    answers: dict[int, list[str]] = ANSWERS,
    finished: bool = True,
    config: dict | None = None,
    model: str = "org/base-model",
) -> IterationStore:
    """
    A run: prompts with their ground truths, what each iteration's opponent answered, numbers, and a log.

    The first answer of every iteration ran into the length limit. The scores of iteration i are 1/(i + 1).
    """
    store = IterationStore(directory, RUN)
    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token_id
    store.write_run(
        {
            "model": model,
            "config": {**CONFIG, **(config or {})},
            "changed_settings": ["beta"],
            "versions": {"spin_trl": "0.1.0"},
            "run": RUN,
            "starts": [{"time": "2026-01-01T00:00:00+0000", "from": "the initial model"}],
            **({"finished": True} if finished else {}),
        }
    )
    tokenizer.save_pretrained(directory)
    write_data(store, games, tokenizer)
    for iteration, texts in answers.items():
        ids = [tokenizer(text)["input_ids"] + [end] for text in texts]
        write_part(store, iteration, {(row, 0): answer for row, answer in enumerate(ids)}, first_reason="length")
        write_numbers(store, iteration)
    store.write_metrics(len(answers), {"evaluation": {"nll": 1 / (len(answers) + 1)}})
    write_log(store, len(answers))
    return store


def write_part(
    store: IterationStore, iteration: int, answers: dict[tuple[int, int], list[int]], first_reason: str = "stop"
) -> None:
    """Answers by row and sample."""
    columns = {
        "row": [row for row, _ in answers],
        "sample": [sample for _, sample in answers],
        "completion_ids": list(answers.values()),
        "finish_reason": [first_reason] + ["stop"] * (len(answers) - 1),
    }
    store.completions(iteration, "generations").write(min(columns["row"]), columns)


def write_data(store: IterationStore, games: list[tuple[str, str]], tokenizer) -> None:
    rows = [
        {
            "row": row,
            "source_row": row + 10,
            "prompt": prompt,
            "prompt_ids": tokenizer(prompt)["input_ids"],
            "chosen_ids": tokenizer(truth)["input_ids"] + [tokenizer.eos_token_id],
        }
        for row, (prompt, truth) in enumerate(games)
    ]
    store.write_data(Dataset.from_list(rows))


def write_numbers(store: IterationStore, iteration: int) -> None:
    store.write_metrics(
        iteration,
        {
            "seconds_generate": 60.0 + iteration,
            "seconds_score": 5.0,
            "seconds_train": 100.0,
            "evaluation": {"nll": 1 / (iteration + 1), "accuracy": 0.5 + iteration / 10},
            "chosen_length": 11.0,
            "rejected_length": 11.5,
            "identical_share": 0.25 * (iteration + 1),
            "cut_off_share": 0.5,
            "never_heard_of": 7.5 + iteration,
            "percentiles": {"chosen": {"p50": 2.0}},
        },
    )


def write_log(store: IterationStore, num_iterations: int, steps_per_iteration: int = 4) -> None:
    """A log of one entry a step; each iteration begins with an entry of its pairs."""
    lines = []
    for iteration in range(num_iterations):
        first = iteration * steps_per_iteration
        lines.append({"step": first, "epoch": iteration, "self_play/iteration": iteration, "self_play/num_pairs": 2})
        for step in range(first + 1, first + steps_per_iteration + 1):
            numbers = {"loss": 1 / step, "rewards/chosen": step / 10, "rewards/rejected": -step / 10, "grad_norm": 2.0}
            lines.append({"step": step, "epoch": step / steps_per_iteration, **numbers})
    store.log_file.write_text("".join(json.dumps(line) + "\n" for line in lines))


# Damage


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
