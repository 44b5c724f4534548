"""Addition of two three-digit numbers, a character a token, by a model whose SFT ended early."""

from pathlib import Path

import numpy as np
from transformers import TrainerCallback, set_seed

from .answers import answer_in_text
from .supervised import character_tokenizer, fine_tune, small_llama
from .task import Row, Task, accuracy


_SEED = 7
_SIZES = {"start": 40_000, "start_check": 400, "train": 1024, "validation": 500, "test": 1000}
_STOP_AT = 65.0  # percent right: undertrained, wherever it is made
_STEPS_BETWEEN_LOOKS = 20
_MAX_STEPS = 3000


def make_rows() -> dict[str, list[Row]]:
    """Pairs of numbers drawn without replacement, so that no two parts share one."""
    pairs = np.random.default_rng(_SEED).choice(900 * 900, size=sum(_SIZES.values()), replace=False)
    parts = np.split(pairs, np.cumsum(list(_SIZES.values()))[:-1])
    return {
        name: [_row(100 + pair // 900, 100 + pair % 900) for pair in part]
        for name, part in zip(_SIZES, parts, strict=True)
    }


def _row(a: int, b: int) -> Row:
    return {"prompt": f"{a}+{b}=", "completion": str(a + b)}


def make_start(folder: Path, max_steps: int | None = None) -> None:
    """
    Raises:
        `RuntimeError`: if SFT ends before the model is as good as it should be.
    """
    set_seed(_SEED)
    rows = make_rows()
    tokenizer = character_tokenizer("0123456789+=")
    model = small_llama(tokenizer, hidden_size=128, num_layers=4)
    stop = StopWhenGoodEnough(tokenizer, rows["start_check"])
    fine_tune(
        model,
        tokenizer,
        rows["start"],
        folder,
        callbacks=[stop],
        seed=_SEED,
        learning_rate=2e-3,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=50,
        per_device_train_batch_size=128,
        max_steps=max_steps or _MAX_STEPS,
    )
    if not stop.is_good_enough and max_steps is None:
        raise RuntimeError(f"After {_MAX_STEPS} steps {stop.accuracy:.1f} % are right, but expected {_STOP_AT}.")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class StopWhenGoodEnough(TrainerCallback):
    """Ends SFT as soon as enough answers are right, on rows that are in no other part."""

    def __init__(self, tokenizer, rows: list[Row]):
        self.tokenizer, self.rows = tokenizer, rows
        self.accuracy = 0.0

    @property
    def is_good_enough(self) -> bool:
        return self.accuracy >= _STOP_AT

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % _STEPS_BETWEEN_LOOKS == 0:
            model.eval()
            self.accuracy = score(model, self.tokenizer, self.rows)
            model.train()
            control.should_training_stop = control.should_training_stop or self.is_good_enough


def score(model, tokenizer, rows: list[Row]) -> float:
    """Percent of sums that are right."""
    return accuracy(answer_in_text(model, tokenizer, [row["prompt"] for row in rows], max_new_tokens=6), rows)


TASK = Task(
    name="addition",
    title="Addition of two three-digit numbers",
    about=(
        "`123+456=` is the prompt, `579` the answer, a character is a token. A Llama of 0.8 M parameters whose SFT was "
        f"ended as soon as {_STOP_AT:.0f} % of {_SIZES['start_check']} sums were right. {_SIZES['train']:,} sums to "
        f"learn from, {_SIZES['validation']} for validation, {_SIZES['test']:,} for the test; no sum is in two parts, "
        "nor in the start's data."
    ),
    score_name="sums right, %",
    greater_is_better=True,
    digits=1,
    learning_rates=(1e-5, 3e-5, 5e-5, 1e-4, 2e-4, 5e-4),
    make_rows=make_rows,
    make_start=make_start,
    score=score,
)
