"""Token ids -> text, with the tokenizer that a run directory holds or names. Downloads nothing, runs no foreign code.

A `tokenizer.json` is read by the tokenizers library itself: importing transformers' tokenizers brings torch along.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


Decode = Callable[[Sequence[int], bool], str]
"""Token ids, and whether special tokens are left out -> text."""


def find_decoder(run_directory: Path, model: str | None) -> tuple[Decode, str | None]:
    """
    The way to read a run's token ids.

    Args:
        run_directory (`Path`): Its checkpoints and opponents hold the tokenizer.
        model (`str`, *optional*): Folder or hub id of the base model, looked up offline.

    Returns:
        `Decode` and, where there is no tokenizer and ids are shown as numbers, a line that says so.
    """
    checkpoints, opponents = (_newest(run_directory, pattern) for pattern in ("checkpoint-*", "iteration-*/opponent"))
    named = [] if model is None else [Path(model) if Path(model).is_dir() else model]
    for load in (_load_file, _load_any):
        for source in (run_directory, *checkpoints, *opponents, *named):
            try:
                decode = load(source)
            except Exception:  # each library and format fails in its own way; another source may do
                continue
            if decode is not None:
                return decode, None
    line = "No tokenizer is found in the run directory, nor that of the model without a network: token ids are shown."
    return _show_ids, line


def _newest(directory: Path, pattern: str) -> list[Path]:
    return sorted(directory.glob(pattern), key=lambda path: (len(str(path)), path), reverse=True)


def _load_file(source: Path | str) -> Decode | None:
    path = Path(source) / "tokenizer.json"
    if not path.exists():
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    return lambda ids, skip_special: tokenizer.decode(list(ids), skip_special_tokens=skip_special)


def _load_any(source: Path | str) -> Decode | None:
    if isinstance(source, Path) and not (source / "tokenizer_config.json").exists():
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(source), local_files_only=True, trust_remote_code=False)
    return lambda ids, skip_special: tokenizer.decode(list(ids), skip_special_tokens=skip_special)


def _show_ids(ids: Sequence[int], skip_special: bool) -> str:
    return " ".join(map(str, ids))


def messages_of(prompt: Any) -> list[tuple[str, str]]:
    """
    A prompt as the data has it, text or messages, as pairs of role and text. The role of a plain text is empty.
    """
    if not isinstance(prompt, list):
        return [("", str(prompt))]
    return [(str(message.get("role", "")), _content_of(message)) for message in prompt]


def _content_of(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(str(block.get("text") or f"[{block.get('type')}]") for block in content)
    parts = [content or "", *(f"[call] {call}" for call in message.get("tool_calls") or [])]
    return "\n".join(part for part in parts if part)
