"""What rendered rows depend on, as a fingerprint under which the `datasets` library finds them again.

The library's own would hash the function that renders, and with it objects whose pickles differ from process to
process; of our classes it would see the names alone, not what a newer version does differently.
"""

import hashlib
import inspect
import json
import os
import sys
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from datasets import Dataset
from datasets.fingerprint import Hasher, get_temporary_cache_files_directory
from transformers import PreTrainedTokenizerBase


_PACKAGES = ("trl", "transformers", "tokenizers", "jinja2")


def rendering_fingerprint(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], modules: Iterable[str]
) -> str:
    """
    Args:
        dataset ([`~datasets.Dataset`]): What is rendered.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Renders it.
        settings (`dict[str, Any]`): How. What is not JSON counts as it prints.
        modules (`Iterable[str]`): Names of those whose code renders.

    Returns:
        `str`: 16 hexadecimal digits.
    """
    parts = {
        "dataset": dataset._fingerprint,
        "tokenizer": _tokenizer_state(tokenizer),
        "settings": settings,
        "code": [inspect.getsource(sys.modules[name]) for name in modules],
        "packages": {name: version(name) for name in _PACKAGES},
    }
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def cache_file_for(dataset: Dataset, fingerprint: str) -> str | None:
    """
    Where what is made of a dataset is kept. `None` leaves it to the library: beside the dataset's own files. A dataset
    in memory has none, so what is made of it goes to a file that is gone when the process ends, and not to memory too.
    """
    if dataset.cache_files:
        return None
    return os.path.join(get_temporary_cache_files_directory(), f"cache-{fingerprint}.arrow")


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> Any:
    """All that token ids depend on. Padding and truncation are left by whoever called the tokenizer last."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return Hasher.hash(tokenizer)
    state = {
        name: value for name, value in json.loads(backend.to_str()).items() if name not in ("padding", "truncation")
    }
    options = {name: value for name, value in tokenizer.init_kwargs.items() if name != "name_or_path"}
    return [type(tokenizer).__qualname__, state, options, tokenizer.special_tokens_map, tokenizer.chat_template]
