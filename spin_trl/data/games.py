"""One row of SFT data -> its games, each a prompt and its ground truth. Knows nothing of tokens and of row numbers."""

from typing import Any, NamedTuple

from .formats import DataFormat


class InvalidRowError(ValueError):
    """A row that cannot be played: the message names the field, what was found and what to do."""


class Game(NamedTuple):
    """A prompt and its ground truth, both text or both lists of messages; and where in the row they are, for errors."""

    prompt: str | list[dict]
    completion: str | list[dict]
    prompt_name: str
    completion_name: str


def split_row(row: dict[str, Any], data_format: DataFormat, train_on_turns: str = "last") -> list[Game]:
    """
    The games of one row: one, or with `train_on_turns="all"` one for every assistant turn of a whole conversation:
    `messages`, `real`, or a `chosen` that holds its prompt. A turn that opens a conversation answers nothing.
    [`InvalidRowError`] if the prompt or the ground truth is missing, empty, not text or of mixed kinds.
    """
    column = data_format.completion_column
    if data_format.name in ("named", "prompt_completion"):
        games = [_separate_columns(row, data_format.prompt_columns, column)]
    elif data_format.name == "preference":
        games = _preference(row, train_on_turns)
    else:
        games = _conversation(row[column], column, train_on_turns)
    for game in games:
        _check_game(game)
    return games


def _separate_columns(row: dict[str, Any], columns: tuple[str, ...], completion: str) -> Game:
    """Several prompt columns are joined by a blank line; empty ones, such as Alpaca's `input`, are left out."""
    prompt = row[columns[0]]
    if len(columns) > 1:
        for column in columns:
            if not isinstance(row[column], str | None):
                raise InvalidRowError(f"`{column}` must be text to be joined, found {_kind(row[column])}.")
        prompt = "\n\n".join(row[column] for column in columns if (row[column] or "").strip())
    return Game(prompt, row[completion], f"`{'+'.join(columns)}`", f"`{completion}`")


def _preference(row: dict[str, Any], train_on_turns: str) -> list[Game]:
    prompt, chosen = row.get("prompt"), row["chosen"]
    if prompt is None and isinstance(chosen, str):
        raise InvalidRowError(
            "`chosen` is text without a `prompt`, so there is no telling where the prompt ends. Separate the two, "
            "for example with `dataset.map(trl.extract_prompt)`."
        )
    is_whole = _is_messages(chosen) and (prompt is None or len(chosen) > 1 or chosen[0]["role"] != "assistant")
    if not is_whole:
        return [Game(prompt, chosen, "`prompt`", "`chosen`")]
    if _is_messages(prompt) and _said(chosen[:-1])[: len(prompt)] != _said(prompt):
        raise InvalidRowError(
            "`chosen` is a whole conversation that does not begin with `prompt`. Make the two agree, or leave only "
            "the assistant's message in `chosen`."
        )
    return _conversation(chosen, "chosen", train_on_turns)


def _conversation(messages: Any, column: str, train_on_turns: str) -> list[Game]:
    if not _is_messages(messages):
        raise _unfit(f"`{column}` must be a non-empty list of messages", messages)
    last = len(messages) - 1
    if messages[last]["role"] != "assistant":
        raise InvalidRowError(
            f"`{column}` ends on the role '{messages[last]['role']}', but the last message is the ground truth and "
            "must be the assistant's. Remove what follows the last assistant message, or rename the role to "
            "'assistant' if that is what it means."
        )
    turns = [turn for turn in range(1, last) if train_on_turns == "all" and messages[turn]["role"] == "assistant"]
    places = {**{turn: f"`{column}[{turn}]`" for turn in turns}, last: f"`{column}`"}
    return [
        Game(messages[:turn], [messages[turn]], f"the prompt of {place}", f"the ground truth of {place}")
        for turn, place in places.items()
    ]


def _check_game(game: Game) -> None:
    prompt, completion, prompt_name, completion_name = game
    _check_side(prompt, prompt_name)
    _check_side(completion, completion_name)
    if isinstance(prompt, list) != isinstance(completion, list):
        raise InvalidRowError(
            f"mixed formats: {prompt_name} is {_kind(prompt)} and {completion_name} is {_kind(completion)}. Make both "
            "text, or both lists of messages."
        )
    if isinstance(prompt, str):
        return
    roles = [message["role"] for message in completion]
    if roles != ["assistant"]:
        raise InvalidRowError(
            f"{completion_name} must be exactly one assistant message, found the roles {roles}. Move earlier messages "
            "to the prompt."
        )
    if prompt[-1]["role"] == "assistant":
        raise InvalidRowError(
            f"{prompt_name} ends on the role 'assistant', but an answer must follow another role. Join two answers in "
            "a row into one message, or move the prompt's last message to the ground truth."
        )


def _check_side(value: Any, name: str) -> None:
    if not isinstance(value, str) and value != [] and not _is_messages(value):
        raise _unfit(f"{name} must be text or a list of messages", value)
    messages = value if isinstance(value, list) else [{"content": value}]
    for message in messages:
        _check_text(message, name)
    if all(map(_is_empty, messages)):
        raise InvalidRowError(f"{name} is empty. Every row needs a prompt and a ground truth; remove the row.")
    for number, message in enumerate(messages):
        if _is_empty(message) and (message["role"] == "assistant" or message.get("content") is None):
            raise InvalidRowError(f"{name}: message {number}, of the role '{message['role']}', is empty. Remove it.")


def _check_text(message: dict, name: str) -> None:
    content = message.get("content")
    if not isinstance(content, str | None):
        raise InvalidRowError(
            f"{name} has a message whose `content` is {_kind(content)}, and it must be text. Join the text parts, and "
            "leave out any others."
        )
    for text in (value for value in message.values() if isinstance(value, str)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRowError(
                f"{name} is not valid Unicode: {text[error.start]!r} at character {error.start} stands alone. Clean "
                "it, for example with `text.encode('utf-8', 'replace').decode()`."
            ) from None


def _is_empty(message: dict) -> bool:
    return not (message.get("content") or "").strip() and not message.get("tool_calls")


def _said(messages: list[dict]) -> list[tuple]:
    """Role and content alone: Arrow may have filled messages with different empty keys."""
    return [(message["role"], message.get("content")) for message in messages]


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(map(_is_message, value))


def _unfit(expected: str, value: Any) -> InvalidRowError:
    remedy = "Fill the cell or remove the row."
    if isinstance(value, int | float):
        remedy = "Convert the column to text."
    elif isinstance(value, str):
        remedy = "Parse it, if it is JSON: `dataset.map(lambda row: {column: json.loads(row[column])})`."
    elif isinstance(value, list) and value:
        remedy = "Give the text itself, or write each message as {'role': ..., 'content': ...}."
    return InvalidRowError(f"{expected}, found {_kind(value)}. {remedy}")


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if value == []:
        return "an empty list"
    if not isinstance(value, list):
        return f"`{type(value).__name__}`"
    odd = next((item for item in value if not _is_message(item)), None)
    if odd is None:
        return "a list of messages"
    keys = f" with the keys {sorted(odd)}" if isinstance(odd, dict) else ""
    return f"a list of `{type(odd).__name__}`{keys}"
