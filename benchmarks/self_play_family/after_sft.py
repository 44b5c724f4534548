"""The demo's task once more, by a model that SFT has trained on the same 1,000 words already: SPIN's own setting."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from . import pronunciation
from .supervised import fine_tune, load


_SEED = 7
_STEPS = 192  # of batches of 32, as a whole run on these words
_LEARNING_RATE = 1e-4  # the best of six for further SFT on them, see quality.md


def make_start(folder: Path, max_steps: int | None = None) -> None:
    """SFT from the demo's own start."""
    with TemporaryDirectory() as temporary:
        pronunciation.make_start(Path(temporary) / "start", max_steps)
        model, tokenizer = load(Path(temporary) / "start")
        fine_tune(
            model,
            tokenizer,
            pronunciation.make_rows()["train"],
            Path(temporary) / "sft",
            seed=_SEED,
            learning_rate=_LEARNING_RATE,
            per_device_train_batch_size=32,
            max_steps=max_steps or _STEPS,
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


TASK = replace(
    pronunciation.TASK,
    name="after_sft",
    title="Pronunciation, after SFT on the same words",
    about=(
        f"The same words and parts, but the start was trained on the 1,000 words already, {_STEPS} steps of SFT at "
        f"{_LEARNING_RATE:g}: what is left for self-play when SFT is over?"
    ),
    learning_rates=(3e-6, 1e-5, 2e-5, 4e-5, 1e-4, 2e-4),
    make_start=make_start,
)
