"""Token ids -> text, with the `tokenizer.json` that a run directory holds or names. Downloads nothing.

The tokenizers library reads it by itself: no foreign code runs, and no torch is imported.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from tokenizers import Tokenizer


Decode = Callable[[Sequence[int]], str]
"""Token ids -> text, without special tokens."""


def find_decoder(run_directory: Path, model: str | None) -> Decode | None:
    """
    The way to read a run's token ids, by the tokenizer of a checkpoint, an opponent, or else the base model, a folder
    or hub id that is looked up offline; `None` where there is none.
    """
    patterns = ("tokenizer.json", "checkpoint-*/tokenizer.json", "iteration-*/opponent/tokenizer.json")
    paths = [path for pattern in patterns for path in sorted(run_directory.glob(pattern), reverse=True)]
    if model is not None:
        paths.append(Path(model, "tokenizer.json"))
        with suppress(ValueError):  # no name of a repository
            paths.append(try_to_load_from_cache(model, "tokenizer.json"))
    for path in paths:
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception:  # of the library's own, also where there is no such file; another one may do
            continue
        return lambda ids: tokenizer.decode(list(ids))
    return None


def messages_of(prompt: Any) -> list[tuple[str, str]]:
    """A prompt as the data has it, text or messages, as pairs of role and text. The role of a plain text is empty."""
    if not isinstance(prompt, list):
        return [("", str(prompt))]
    return [(str(message.get("role", "")), _content_of(message)) for message in prompt]


def _content_of(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(str(block.get("text") or f"[{block.get('type')}]") for block in content)
    parts = [content or "", *(f"[call] {call}" for call in message.get("tool_calls") or [])]
    return "\n".join(part for part in parts if part)
