"""SFT rows -> token ids, such that a sampler which repeats the ground truth gives the same ids.

Every prompt is rendered once, here. The sampler is sent these ids, and the ids that come back are trained on as they
are. Rows that were rendered before, in whatever process, are found again by `datasets`. Knows nothing of HTTP, models
or paths.
"""

import inspect
import json
import os
from collections.abc import Collection
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher, get_temporary_cache_files_directory
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import remove_none_values

from .chat_template import ChatTemplate, end_after_first
from .formats import DataFormat, detect_format
from .games import Game, InvalidRowError, split_row


_FEATURES = {
    "source_row": Value("int64"),
    "prompt": Value("string"),
    "prompt_ids": List(Value("int32")),
    "chosen_ids": List(Value("int32")),
    "rejected_ids": List(Value("int32")),
    "invalid": Value("string"),
}


class TokenizedData(NamedTuple):
    """
    One row per game, with the columns `row` (its number here), `source_row` (its number in the user's dataset),
    `prompt` (text or messages), `prompt_ids` and `chosen_ids` (ending in one end token); `rejected_ids` too where both
    sides were asked for.
    """

    dataset: Dataset
    invalid_rows: list[tuple[int, str]]  # of every row left out its number in the user's dataset, and why


def tokenize_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    end_token_ids: Collection[int],
    prompt_column: str | None = None,
    completion_column: str | None = None,
    train_on_turns: str = "last",
    chat_template_kwargs: dict[str, Any] | None = None,
    skip_invalid_rows: bool = False,
    num_proc: int | None = None,
    both_sides: bool = False,
) -> TokenizedData:
    """
    Render every row of a dataset, in one of `formats.ACCEPTED_FORMATS`, into token ids.

    Args:
        end_token_ids (`Collection[int]`): Token ids at which the model stops; the first is appended to plain text.
        both_sides (`bool`): Whether the rows have a `rejected` side, which is to be rendered as the `chosen` one is.

    Raises:
        [`InvalidRowError`]: naming the row, if it cannot be played and `skip_invalid_rows` is not set.
        `ValueError`: if no row is valid, or if there is no chat template for conversations.
    """
    data_format = detect_format(dataset.column_names, prompt_column, completion_column)
    features = Features({**_FEATURES, "prompt": data_format.prompt_feature(dataset)})
    unreadable = _unreadable_rows(dataset)
    if unreadable and not skip_invalid_rows:
        raise InvalidRowError(_refusal(*unreadable[0]))
    readable = np.setdiff1d(np.arange(len(dataset)), [number for number, _ in unreadable])
    end_token_ids, chat_template = tuple(end_token_ids), None
    settings = data_format, train_on_turns, end_token_ids, chat_template_kwargs, skip_invalid_rows, both_sides
    fingerprint = _fingerprint(dataset, tokenizer, (*settings, str(features)))
    if features["prompt"] != Value("string"):
        chat_template = ChatTemplate(tokenizer, end_token_ids, chat_template_kwargs)
    renderer = _Renderer(
        data_format, train_on_turns, tokenizer, end_token_ids, chat_template, readable, skip_invalid_rows, both_sides
    )
    cache_file = None  # beside the dataset's own files; of one in memory, a file that is gone when the process ends
    if not dataset.cache_files:
        cache_file = os.path.join(get_temporary_cache_files_directory(), f"cache-{fingerprint}.arrow")
    rendered = (dataset.select(readable) if unreadable else dataset).map(
        renderer.render_batch,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=features,
        num_proc=num_proc,
        new_fingerprint=fingerprint,
        cache_file_name=cache_file,
        desc="Tokenizing prompts and truths",
    )
    if not both_sides:
        rendered = rendered.remove_columns("rejected_ids")
    return _without_invalid_rows(rendered, len(dataset), unreadable)


class _Renderer(NamedTuple):
    """Splits rows, whose numbers in the user's data are `row_numbers`, into their games and renders them."""

    data_format: DataFormat
    train_on_turns: str
    tokenizer: PreTrainedTokenizerBase
    end_token_ids: tuple[int, ...]
    chat_template: ChatTemplate | None
    row_numbers: np.ndarray
    skip_invalid_rows: bool
    both_sides: bool

    def render_batch(self, batch: dict[str, list], positions: list[int]) -> dict[str, list]:
        games = []
        for place, number in enumerate(self.row_numbers[positions].tolist()):
            row = {name: values[place] for name, values in batch.items()}
            try:
                rendered = [self._render_both_sides(row)] if self.both_sides else self._render(row)
            except InvalidRowError as error:
                if not self.skip_invalid_rows:
                    raise InvalidRowError(_refusal(number, str(error))) from error
                rendered = [{"invalid": str(error)}]
            games += [{"source_row": number, **game} for game in rendered]
        return {name: [game.get(name) for game in games] for name in _FEATURES}

    def _render(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        template_kwargs = {"tools": _structure(row, "tools"), **(_structure(row, "chat_template_kwargs") or {})}
        games = []
        for game in split_row(row, self.data_format, self.train_on_turns):
            is_text = isinstance(game.prompt, str)
            ids = self._render_text(game) if is_text else self.chat_template.render(game, **template_kwargs)
            games.append({"prompt": game.prompt, "prompt_ids": ids[0], "chosen_ids": ids[1]})
        return games

    def _render_both_sides(self, row: dict[str, Any]) -> dict[str, Any]:
        (chosen,) = self._render(row)
        if isinstance(row["chosen"], str) and isinstance(row["rejected"], list):
            raise InvalidRowError("mixed formats: `chosen` is text and `rejected` is not. Make both text, or messages.")
        try:
            (rejected,) = self._render({**row, "chosen": row["rejected"]})
        except InvalidRowError as error:
            raise InvalidRowError(f"its `rejected`, read as a `chosen`: {error}") from error
        if chosen["prompt_ids"] != rejected["prompt_ids"]:
            raise InvalidRowError(
                "`chosen` and `rejected` answer different prompts (in conversations, all messages but the last). Cut "
                "both after the first answer in which they differ."
            )
        return {**chosen, "rejected_ids": rejected["chosen_ids"]}

    def _render_text(self, game: Game) -> tuple[list[int], list[int]]:
        prompt_ids = self.tokenizer(game.prompt)["input_ids"]
        # Some tokenizers end every text with their end token; nothing can follow it.
        while prompt_ids and prompt_ids[-1] == self.tokenizer.eos_token_id:
            prompt_ids = prompt_ids[:-1]
        full_ids = self.tokenizer(game.prompt + game.completion)["input_ids"]
        chosen_ids = full_ids[len(prompt_ids) :]
        if full_ids[: len(prompt_ids)] != prompt_ids:
            # Tokens merge across the boundary. The sampler goes on from the prompt's own, so must the ground truth.
            chosen_ids = self.tokenizer(game.completion, add_special_tokens=False)["input_ids"]
        chosen_ids = end_after_first(chosen_ids, self.end_token_ids)
        for name, ids in ((game.prompt_name, prompt_ids), (game.completion_name, chosen_ids[:-1])):
            if not ids:
                raise InvalidRowError(
                    f"the tokenizer makes no tokens of {name}, but at least one is needed. Remove the row, or pass as "
                    "`processing_class` the tokenizer of a model that knows these characters."
                )
        return prompt_ids, chosen_ids


def _without_invalid_rows(rendered: Dataset, num_source_rows: int, unreadable: list[tuple[int, str]]) -> TokenizedData:
    table = rendered.data.table.select(["source_row", "invalid"])
    is_valid = table["invalid"].is_null()
    invalid = sorted([*unreadable, *map(tuple, map(dict.values, table.filter(pc.invert(is_valid)).to_pylist()))])
    valid = np.flatnonzero(is_valid.to_numpy())
    if not len(valid):
        raise ValueError(f"None of the {num_source_rows} rows is valid. {_refusal(*invalid[0])}")
    rendered = (rendered.select(valid) if invalid else rendered).remove_columns("invalid")
    return TokenizedData(rendered.add_column("row", np.arange(len(rendered))), invalid)


def _refusal(number: int, reason: str) -> str:
    return f"Row {number}: {reason} (`skip_invalid_rows=True` leaves such rows out and lists them.)"


def _unreadable_rows(dataset: Dataset) -> list[tuple[int, str]]:
    """Rows with bytes that are no text at all, which reading any batch they are in would trip over."""
    try:
        dataset.data.validate(full=True)
        return []
    except pa.ArrowInvalid:
        reasons: dict[int, str] = {}
    for column in dataset.column_names:
        cells = dataset.select_columns(column)
        for number in range(len(dataset)):
            try:
                cells[number]
            except UnicodeDecodeError as error:
                reasons[number] = f"`{column}` is not valid Unicode: {error}. Load the file in its own encoding."
    return sorted(reasons.items())


def _structure(row: dict[str, Any], column: str) -> Any:
    """A cell that is a list or dict, or JSON of one, without the empty keys that Arrow fills in from other rows."""
    value = row.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise InvalidRowError(f"`{column}` is text but not JSON: {error}. Write it with `json.dumps`.") from error
    return remove_none_values(value) if value else None


def _fingerprint(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, settings: tuple) -> str:
    """
    What rendered rows depend on. The library's own would hash objects whose pickles differ from process to process, and
    of our classes the names alone, not what a newer version does.
    """
    code = [inspect.getsource(inspect.getmodule(part)) for part in (tokenize_dataset, ChatTemplate, split_row)]
    packages = [version(name) for name in ("trl", "transformers", "tokenizers", "jinja2")]
    return Hasher.hash((dataset._fingerprint, _tokenizer_state(tokenizer), settings, code, packages))


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> Any:
    """All that token ids depend on. Padding and truncation are left by whoever called the tokenizer last."""
    if not tokenizer.is_fast:
        return tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    options = {name: value for name, value in tokenizer.init_kwargs.items() if name != "name_or_path"}
    name = type(tokenizer).__qualname__
    return json.dumps([name, state, options, tokenizer.special_tokens_map, tokenizer.chat_template], default=str)
