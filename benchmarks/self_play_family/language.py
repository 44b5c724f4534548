"""
A language whose probabilities are known: so few sequences that a model's distance to it is computed, not estimated.

Four letters. A prompt is seven of them, an answer one to four. Each letter depends on the two before it, as does
whether the answer ends there; behind four letters it always does. That makes 340 answers to a prompt.
"""

import itertools
from functools import cached_property
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from .answers import completion_ids, logps
from .supervised import character_tokenizer, fine_tune, small_llama
from .task import Row, Task


LETTERS = "abcd"
_END = len(LETTERS)  # column of the transition table
_MAX_LETTERS = 4
_PROMPT_LETTERS = 7
_SEED = 11
_NUM_PROMPTS = {"start": 4000, "train": 1024, "validation": 12, "test": 12}
# One to learn from: several would often be equal, and self-play drops rows that repeat an earlier one.
_SAMPLES_PER_PROMPT = {"start": 1, "train": 1, "validation": 25, "test": 25}


class Language:
    """
    Args:
        transitions (`np.ndarray` of shape `(16, 5)`): Probabilities of each letter and of the end behind two letters.
    """

    def __init__(self, transitions: np.ndarray):
        self.transitions = transitions

    @classmethod
    def random(cls, seed: int) -> "Language":
        return cls(np.random.default_rng(seed).dirichlet([0.5] * (len(LETTERS) + 1), size=len(LETTERS) ** 2))

    def blended_with(self, other: "Language") -> "Language":
        return Language((self.transitions + other.transitions) / 2)

    def probabilities(self, prompt: str) -> dict[str, float]:
        """Of every answer to a prompt. They add up to 1."""
        return self._by_last_letters[prompt[-2:]]

    def sample(self, prompt: str, number: int, generator: np.random.Generator) -> list[str]:
        answers = self.probabilities(prompt)
        return generator.choice(list(answers), size=number, p=list(answers.values())).tolist()

    @cached_property
    def _by_last_letters(self) -> dict[str, dict[str, float]]:
        """Nothing else of a prompt matters."""
        answers = answers_of_the_language()
        pairs = ["".join(pair) for pair in itertools.product(LETTERS, repeat=2)]
        return {pair: {answer: self._probability(pair, answer) for answer in answers} for pair in pairs}

    def _probability(self, prompt: str, answer: str) -> float:
        probability = 1.0
        for place, letter in enumerate(answer):
            probability *= self._next(prompt + answer[:place], is_first=place == 0)[LETTERS.index(letter)]
        if len(answer) < _MAX_LETTERS:
            probability *= self._next(prompt + answer, is_first=False)[_END]
        return float(probability)

    def _next(self, text: str, is_first: bool) -> np.ndarray:
        row = self.transitions[len(LETTERS) * LETTERS.index(text[-2]) + LETTERS.index(text[-1])]
        if not is_first:
            return row
        letters = np.append(row[:_END], 0.0)  # an answer has a letter at least
        return letters / letters.sum()


def answers_of_the_language() -> list[str]:
    return ["".join(t) for n in range(1, _MAX_LETTERS + 1) for t in itertools.product(LETTERS, repeat=n)]


LANGUAGE = Language.random(_SEED)
OTHER_LANGUAGE = LANGUAGE.blended_with(Language.random(_SEED + 1))


def prompts() -> dict[str, list[str]]:
    """Drawn without replacement, so that no two parts share one."""
    every = ["".join(letters) for letters in itertools.product(LETTERS, repeat=_PROMPT_LETTERS)]
    drawn = np.random.default_rng(_SEED).choice(every, size=sum(_NUM_PROMPTS.values()), replace=False)
    bounds = np.cumsum(list(_NUM_PROMPTS.values()))[:-1]
    return {part: some.tolist() for part, some in zip(_NUM_PROMPTS, np.split(drawn, bounds), strict=True)}


def make_rows() -> dict[str, list[Row]]:
    """Those of the start are of the other language."""
    generator = np.random.default_rng(_SEED)
    return {
        part: [
            {"prompt": prompt, "completion": answer}
            for prompt in some
            for answer in (OTHER_LANGUAGE if part == "start" else LANGUAGE).sample(
                prompt, _SAMPLES_PER_PROMPT[part], generator
            )
        ]
        for part, some in prompts().items()
    }


def make_start(folder: Path, max_steps: int | None = None) -> None:
    """SFT on plenty of samples of another language, which is half this one."""
    set_seed(_SEED)
    tokenizer = character_tokenizer(LETTERS)
    model = small_llama(tokenizer, hidden_size=96, num_layers=2)
    fine_tune(
        model,
        tokenizer,
        make_rows()["start"],
        folder,
        seed=_SEED,
        learning_rate=2e-3,
        per_device_train_batch_size=64,
        num_train_epochs=4,
        max_steps=max_steps or -1,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def total_variation(truth: dict[str, float], found: dict[str, float]) -> float:
    """
    Half the sum of the differences over all sequences there are.

    Args:
        truth (`dict[str, float]`): Probability of every sequence that has one. Adds up to 1.
        found (`dict[str, float]`):
            Probability of the same sequences. What is missing to 1 lies on others, where the truth is 0: so the
            distance is exact, although nobody lists these.
    """
    elsewhere = max(0.0, 1 - sum(found.values()))
    return (sum(abs(truth[answer] - found[answer]) for answer in truth) + elsewhere) / 2


def model_probabilities(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> dict[str, float]:
    """What a model gives to every answer of the language, end token included."""
    answers = answers_of_the_language()
    completions = [completion_ids(tokenizer, prompt, answer) for answer in answers]
    found = logps(model, [tokenizer(prompt)["input_ids"]] * len(answers), completions)
    return dict(zip(answers, np.exp(found).tolist(), strict=True))


def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> float:
    """Total variation distance to the language, averaged over the prompts of these rows."""
    found = [
        total_variation(LANGUAGE.probabilities(prompt), model_probabilities(model, tokenizer, prompt))
        for prompt in sorted({row["prompt"] for row in rows})
    ]
    return float(np.mean(found))


TASK = Task(
    name="language",
    title="A language with known probabilities",
    about=(
        "Four letters, prompts of seven, answers of one to four: 340 answers to a prompt, each of known probability, "
        "so that the total variation distance is exact (0 is the data's distribution, 1 has nothing in common with "
        "it). A Llama of 0.2 M parameters, trained on a language that is half this one, learns from 1,024 prompts "
        "with a sample each. 12 other prompts are the validation part, 12 more the test part."
    ),
    score_name="total variation distance (lower is better)",
    greater_is_better=False,
    digits=3,
    learning_rates=(1e-4, 2e-4, 3e-4, 6e-4, 1e-3, 2e-3),
    make_rows=make_rows,
    make_start=make_start,
    score=score,
)
