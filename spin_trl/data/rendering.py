"""SFT rows -> token ids, such that a sampler which repeats the ground truth gives the same ids.

Every prompt is rendered once, here. The sampler is sent these ids, and the ids that come back are trained on as they
are. Knows nothing of HTTP, models or paths.
"""

import json
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import remove_none_values

from .chat_template import ChatTemplate, end_after_first
from .columns import batches
from .formats import DataFormat, detect_format
from .games import Game, InvalidRowError, split_row
from .token_cache import cache_file_for, rendering_fingerprint


_FEATURES = {
    "source_row": Value("int64"),
    "prompt": Value("string"),
    "prompt_ids": List(Value("int32")),
    "chosen_ids": List(Value("int32")),
    "invalid": Value("string"),
}
_RENDERING_MODULES = (__name__, ChatTemplate.__module__, Game.__module__)


class TokenizedData(NamedTuple):
    """
    A rendered dataset.

    Args:
        dataset ([`~datasets.Dataset`]): One row per game, with the columns `row` (`int`, its number here), `source_row`
            (`int`, its number in the user's dataset), `prompt` (text or messages), `prompt_ids` and `chosen_ids`
            (`list[int]`, ending in one end token).
        invalid_rows (`list[tuple[int, str]]`): Of every row left out its number in the user's dataset, and why.
    """

    dataset: Dataset
    invalid_rows: list[tuple[int, str]]


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
) -> TokenizedData:
    """
    Render every row of an SFT dataset into token ids.

    Args:
        dataset ([`~datasets.Dataset`]): Rows in one of the accepted formats (see `data.ACCEPTED_FORMATS`).
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): With a chat template if the rows are conversational.
        end_token_ids (`Collection[int]`): Token ids at which the model stops; the first is appended to plain text.
        prompt_column, completion_column, train_on_turns, chat_template_kwargs, skip_invalid_rows:
            As in [`SPINConfig`].
        num_proc (`int`, *optional*): Number of processes.

    Raises:
        [`InvalidRowError`]: naming the row, if it cannot be played and `skip_invalid_rows` is not set.
        `ValueError`: if no row is valid, or if there is no chat template for conversations.
    """
    data_format = detect_format(dataset.column_names, prompt_column, completion_column)
    prompt_feature = data_format.prompt_feature(dataset)
    chat_template = None
    if prompt_feature != Value("string") and tokenizer.chat_template is not None:
        chat_template = ChatTemplate(tokenizer, end_token_ids, chat_template_kwargs)
    renderer = RowRenderer(data_format, train_on_turns, tokenizer, tuple(end_token_ids), chat_template)
    features = Features({**_FEATURES, "prompt": prompt_feature})
    unreadable = _unreadable_rows(dataset)
    if unreadable and not skip_invalid_rows:
        raise InvalidRowError(_refusal(*unreadable[0]))
    readable = np.setdiff1d(np.arange(len(dataset)), [number for number, _ in unreadable])
    settings = {
        "format": data_format,
        "train_on_turns": train_on_turns,
        "end_token_ids": tuple(end_token_ids),
        "chat_template_kwargs": chat_template_kwargs,
        "skip_invalid_rows": skip_invalid_rows,
        "features": features,
    }
    fingerprint = rendering_fingerprint(dataset, tokenizer, settings, _RENDERING_MODULES)
    rendered = (dataset.select(readable) if unreadable else dataset).map(
        _batch_renderer(renderer, readable, list(features), skip_invalid_rows),
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=features,
        num_proc=num_proc,
        new_fingerprint=fingerprint,
        cache_file_name=cache_file_for(dataset, fingerprint),
        desc="Tokenizing prompts and truths",
    )
    return _without_invalid_rows(rendered, len(dataset), unreadable)


def _batch_renderer(
    renderer: "RowRenderer", row_numbers: np.ndarray, columns: list[str], skip_invalid_rows: bool
) -> Callable[[dict[str, list], list[int]], dict[str, list]]:
    """What renders a batch of rows, given their positions, whose numbers in the user's data are `row_numbers`."""

    def render_batch(batch: dict[str, list], positions: list[int]) -> dict[str, list]:
        games = []
        for place, number in enumerate(row_numbers[positions].tolist()):
            try:
                rendered = renderer.render({name: values[place] for name, values in batch.items()})
            except InvalidRowError as error:
                if not skip_invalid_rows:
                    raise InvalidRowError(_refusal(number, str(error))) from error
                rendered = [{"invalid": str(error)}]
            games += [{"source_row": number, **game} for game in rendered]
        return {name: [game.get(name) for game in games] for name in columns}

    return render_batch


def _without_invalid_rows(rendered: Dataset, num_source_rows: int, unreadable: list[tuple[int, str]]) -> TokenizedData:
    invalid, is_valid = list(unreadable), []
    for batch in batches(rendered, ["source_row", "invalid"]):
        is_valid.append(batch["invalid"].is_null().to_numpy())
        refused = batch.filter(batch["invalid"].is_valid())
        invalid += zip(refused["source_row"].to_pylist(), refused["invalid"].to_pylist(), strict=True)
    valid = np.flatnonzero(np.concatenate([np.empty(0, bool), *is_valid]))
    invalid.sort()
    if not len(valid):
        raise ValueError(f"None of the {num_source_rows} rows is valid. {_refusal(*invalid[0])}")
    rendered = (rendered.select(valid) if invalid else rendered).remove_columns("invalid")
    return TokenizedData(rendered.add_column("row", np.arange(len(rendered))), invalid)


class RowRenderer:
    """
    Splits one row into its games and renders them.

    Args:
        data_format ([`DataFormat`]): How to read the row.
        train_on_turns (`str`): "last" or "all".
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): For text.
        end_token_ids (`tuple[int, ...]`): Token ids at which the model stops.
        chat_template ([`ChatTemplate`], *optional*): For conversations.
    """

    def __init__(
        self,
        data_format: DataFormat,
        train_on_turns: str,
        tokenizer: PreTrainedTokenizerBase,
        end_token_ids: tuple[int, ...],
        chat_template: ChatTemplate | None,
    ):
        self.data_format = data_format
        self.train_on_turns = train_on_turns
        self.tokenizer = tokenizer
        self.end_token_ids = end_token_ids
        self.chat_template = chat_template

    def render(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """
        The row's games, each with `prompt`, `prompt_ids` and `chosen_ids`.

        Raises:
            `InvalidRowError`: if the row cannot be played.
            `ValueError`: if it is a conversation and there is no chat template.
        """
        template_kwargs = {
            "tools": _structure(row, "tools"),
            **(_structure(row, "chat_template_kwargs") or {}),
        }
        games = []
        for game in split_row(row, self.data_format, self.train_on_turns):
            if isinstance(game.prompt, str):
                prompt_ids, chosen_ids = _render_text(game.prompt, game.completion, self.tokenizer)
                chosen_ids = end_after_first(chosen_ids, self.end_token_ids)
                _require_tokens(prompt_ids, game.prompt_name)
                _require_tokens(chosen_ids[:-1], game.completion_name)
            else:
                prompt_ids, chosen_ids = self._require_chat_template(game).render(game, **template_kwargs)
            games.append({"prompt": game.prompt, "prompt_ids": prompt_ids, "chosen_ids": chosen_ids})
        return games

    def _require_chat_template(self, game: Game) -> ChatTemplate:
        if self.chat_template is None:
            raise ValueError(
                f"The dataset is conversational ({game.completion_name} is a message), but the tokenizer has no chat "
                "template. Set `tokenizer.chat_template` to the model's own and pass the tokenizer as "
                "`processing_class`; for a base model give the prompts and ground truths as text, or add a template "
                "with `trl.clone_chat_template`."
            )
        return self.chat_template


def _require_tokens(ids: list[int], name: str) -> None:
    if not ids:
        raise InvalidRowError(
            f"the tokenizer makes no tokens of {name}, but at least one is needed. Remove the row, or pass as "
            "`processing_class` the tokenizer of a model that knows these characters."
        )


def _refusal(number: int, reason: str) -> str:
    return f"Row {number}: {reason} (`skip_invalid_rows=True` leaves such rows out and lists them.)"


def _unreadable_rows(dataset: Dataset) -> list[tuple[int, str]]:
    """Rows with bytes that are no text at all, which reading any batch they are in would trip over."""
    try:
        dataset.data.validate(full=True)
        return []
    except pa.ArrowInvalid:
        pass
    reasons: dict[int, str] = {}
    for column in dataset.column_names:
        cells = dataset.select_columns(column)
        for number in range(len(dataset)):
            try:
                cells[number]
            except UnicodeDecodeError as error:
                reasons.setdefault(
                    number, f"`{column}` is not valid Unicode: {error}. Load the file in its own encoding."
                )
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


def _render_text(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    prompt_ids = tokenizer(prompt)["input_ids"]
    # Some tokenizers end every text with their end token; nothing can follow it.
    while prompt_ids and prompt_ids[-1] == tokenizer.eos_token_id:
        prompt_ids = prompt_ids[:-1]
    full_ids = tokenizer(prompt + completion)["input_ids"]
    if full_ids[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, full_ids[len(prompt_ids) :]
    # Tokens merge across the boundary. The sampler goes on from the prompt's own tokens, so must the ground truth.
    return prompt_ids, tokenizer(completion, add_special_tokens=False)["input_ids"]
