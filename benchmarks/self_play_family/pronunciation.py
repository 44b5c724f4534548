"""The demo's task: a model that pronounces American English learns another accent from 1,000 words."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from .answers import answer_in_text
from .task import Row, Task


ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
sys.path.insert(0, str(RECIPES))  # recipes are scripts, not a package

from pronunciation_metrics import compute_generation_metrics  # noqa: E402


_DEMO_START = ROOT / "runs" / "pronunciation" / "sft"
_DATA = RECIPES / "data" / "pronunciation"
_NUM_VALIDATION = 400  # of the 1,000 held-out words
_MAX_PHONES = 20


def make_rows() -> dict[str, list[Row]]:
    """The words of the three parts differ, and none of the held-out ones is in the start's data."""
    held_out = _read("accent_test.jsonl")
    return {
        "train": _read("accent_train.jsonl"),
        "validation": held_out[:_NUM_VALIDATION],
        "test": held_out[_NUM_VALIDATION:],
    }


def _read(name: str) -> list[Row]:
    return [json.loads(line) for line in (_DATA / name).read_text().splitlines()]


def make_start(folder: Path, max_steps: int | None = None) -> None:
    """The demo's own model, by its own script, if the demo has not made it yet."""
    if max_steps is None and _DEMO_START.is_dir():
        shutil.copytree(_DEMO_START, folder)
        return
    command = [sys.executable, "recipes/pronunciation_sft.py", "--output_dir", str(folder), "--disable_tqdm", "true"]
    if max_steps is not None:
        command += ["--max_steps", str(max_steps)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def score(model, tokenizer, rows: list[Row]) -> float:
    """`word_accuracy` of the demo, in percent."""
    prompts = [row["prompt"] for row in rows]
    answers = answer_in_text(model, tokenizer, prompts, _MAX_PHONES)
    return 100 * compute_generation_metrics(prompts, [row["completion"] for row in rows], answers)["word_accuracy"]


TASK = Task(
    name="pronunciation",
    title="Pronunciation",
    about=(
        "The demo: a Llama of 0.8 M parameters, at the end of useful SFT on 10,000 words in one accent, learns another "
        "accent from 1,000 words. 400 held-out words are the validation part, 600 others the test part."
    ),
    score_name="words right, %",
    greater_is_better=True,
    digits=1,
    learning_rates=(3e-5, 6e-5, 1e-4, 2e-4, 3e-4, 6e-4),
    make_rows=make_rows,
    make_start=make_start,
    score=score,
)
