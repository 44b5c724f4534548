"""
The rule by which answers to GSM8K and its like are marked: the last number is the answer.

Functions in the signature of TRL's GRPOTrainer. They work on text and know nothing of models.
"""

import re
from collections.abc import Sequence
from decimal import Decimal


# 1,234.50 is one number; the minus of 10-5 belongs to no number, that of x = -5 does
_NUMBER = re.compile(r"(?<!\d)-?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


def last_number(text: str) -> Decimal | None:
    """The last number in a text; `None` where there is none."""
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def last_number_matches(
    completions: Sequence[str | list[dict[str, str]]], ground_truth: Sequence[str], **kwargs
) -> list[float | None]:
    """
    1.0 where the last number of a completion equals the last number of its ground truth, else 0.0.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Text, or the assistant's message.
        ground_truth (`list[str]`):
            The text of each ground truth, whole: what leads to the result may be in it.
        **kwargs:
            What else the trainer passes.

    Returns:
        `list[float | None]`: `None` where the ground truth has no number, so that the rule does not apply. Where that
        happens, pass another function too.
    """
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    expected = [last_number(truth) for truth in ground_truth]
    return [
        None if number is None else float(last_number(text) == number)
        for text, number in zip(texts, expected, strict=True)
    ]
