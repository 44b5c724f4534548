"""SFT rows in any accepted format -> prompt and ground truth. Knows nothing of tokens, HTTP, models or paths."""

from typing import Any

from datasets import Dataset, IterableDataset
from trl.data_utils import is_conversational


ACCEPTED_FORMATS = """\
  - `prompt` and `completion`, both text or both lists of messages
  - `messages`, a conversation whose last message is the assistant's ground truth
(a `prompt` or `messages` row may come with TRL's `tools` and `chat_template_kwargs` columns)"""


def check_dataset(dataset: Any, name: str) -> None:
    """
    Refuse a dataset that cannot be played on, by its type, size and columns alone.

    Args:
        dataset ([`~datasets.Dataset`]): The dataset as the user passed it.
        name (`str`): The argument's name, for the error.

    Raises:
        `TypeError`: not a map-style dataset.
        `ValueError`: empty, a vision dataset, or none of the accepted formats.
    """
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            f"`{name}` is an `IterableDataset`, but every iteration answers all prompts anew and needs to know how "
            "many there are. Load it without `streaming=True`, or materialise it with "
            "`Dataset.from_generator(lambda: iter(dataset))`."
        )
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"`{name}` must be a `datasets.Dataset` of prompts and ground truths, got `{type(dataset).__name__}`."
        )
    vision_columns = {"image", "images"} & set(dataset.column_names)
    if vision_columns:
        raise ValueError(
            f"`{name}` has the column(s) {sorted(vision_columns)}: vision datasets are not supported, since prompts "
            "go to the opponent as token ids. Use a text dataset, or remove the column(s)."
        )
    if detect_format(dataset.column_names) is None:
        raise ValueError(
            f"`{name}` has the columns {dataset.column_names}, which is none of the accepted formats:\n"
            f"{ACCEPTED_FORMATS}\nRename the columns with `dataset.rename_columns({{...}})`."
        )
    if len(dataset) == 0:
        raise ValueError(f"`{name}` is empty: at least one row with a prompt and its ground truth is needed.")


def detect_format(column_names: list[str]) -> str | None:
    """Name of the accepted format with these columns, or `None`."""
    columns = set(column_names)
    if {"prompt", "completion"} <= columns:
        return "prompt_completion"
    if "messages" in columns:
        return "messages"
    return None


def split_row(row: dict[str, Any], index: int) -> tuple[str | list[dict], str | list[dict]]:
    """
    The prompt and the ground truth of one row, both text or both lists of messages.

    Raises:
        `ValueError`: naming the row and the field, if either is missing, empty or of mixed kinds.
    """
    prompt, completion = _split_messages(row, index) if "messages" in row else (row["prompt"], row["completion"])
    for field, value in (("prompt", prompt), ("completion", completion)):
        _check_field(value, field, index)
    if isinstance(prompt, list) != isinstance(completion, list):
        raise ValueError(
            f"Row {index} mixes formats: its prompt is {_kind(prompt)} and its completion is {_kind(completion)}. "
            "Make both text, or both lists of messages."
        )
    if isinstance(completion, list) and (len(completion) != 1 or completion[0]["role"] != "assistant"):
        raise ValueError(
            f"Row {index}: `completion` must be exactly one assistant message, found the roles "
            f"{[message['role'] for message in completion]}. Move earlier messages to the prompt."
        )
    return prompt, completion


def _split_messages(row: dict[str, Any], index: int) -> tuple[list[dict], list[dict]]:
    messages = row["messages"]
    if not is_conversational({"messages": messages or None}):
        raise ValueError(f"Row {index}: `messages` must be a non-empty list of messages, found {_kind(messages)}.")
    if messages[-1]["role"] != "assistant":
        raise ValueError(
            f"Row {index}: `messages` ends on the role '{messages[-1]['role']}', but the last message is the ground "
            "truth and must be the assistant's. Remove what follows the last assistant message."
        )
    return messages[:-1], messages[-1:]


def _check_field(value: Any, field: str, index: int) -> None:
    is_messages = isinstance(value, list) and all(isinstance(m, dict) and "role" in m for m in value)
    if not isinstance(value, str) and not is_messages:
        raise ValueError(f"Row {index}: `{field}` must be text or a list of messages, found {_kind(value)}.")
    text = "".join(message.get("content") or "" for message in value) if is_messages else value
    if not text.strip() and not (is_messages and any(message.get("tool_calls") for message in value)):
        raise ValueError(
            f"Row {index}: `{field}` is empty. Every row needs a prompt and a ground truth; remove the row, for "
            "example with `dataset.filter`."
        )


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, list):
        return "a list of messages" if value else "an empty list"
    return f"`{type(value).__name__}`"
