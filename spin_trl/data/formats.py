"""Which datasets can be played on, and in which of the accepted formats they are. Knows nothing of tokens or models.

The columns tell the format: `named` where `prompt_column` and `completion_column` say which, otherwise the first of
`_COLUMNS` that they fit. `rejected` and `generated` sides are ignored: the opponent makes its own. How a row of each
becomes games is in `games.py`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from datasets import Dataset, IterableDataset, Value


ACCEPTED_FORMATS = """\
  - `prompt` and `completion`, both text or both lists of messages
  - `messages`, a conversation whose last message is the assistant's ground truth
  - `chosen`, a whole conversation, or with `prompt` also the answer alone (`rejected` is ignored)
  - `real`, a conversation as in uclaml/SPIN's data (`generated` is ignored)
  - any columns named by `prompt_column` (several joined by "+", as in "instruction+input") and `completion_column`
(conversations may come with TRL's `tools` and `chat_template_kwargs` columns)"""

_COLUMNS = {
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "preference": ("chosen",),
    "real": ("real",),
}
_MEDIA_COLUMNS = {"image", "images", "video", "videos", "audio", "audios"}


@dataclass(frozen=True)
class DataFormat:
    """How the rows of a dataset are to be read: one of the formats in this module's docstring, and its columns."""

    name: str
    prompt_columns: tuple[str, ...]
    completion_column: str

    def prompt_feature(self, dataset: Dataset) -> Any:
        """The type of the prompts to come: that of the conversations, if there are any, else text."""
        columns = (*self.prompt_columns, self.completion_column)
        features = [dataset.features[column] for column in columns if column in dataset.features]
        return next((feature for feature in features if not isinstance(feature, Value)), Value("string"))


def detect_format(
    column_names: list[str], prompt_column: str | None = None, completion_column: str | None = None
) -> DataFormat | None:
    """The format that these columns are in, or `None`. See the module's docstring for the order of precedence."""
    if prompt_column is not None and completion_column is not None:
        prompt_columns = (prompt_column,) if prompt_column in column_names else tuple(prompt_column.split("+"))
        if not {*prompt_columns, completion_column} <= set(column_names):
            return None
        return DataFormat("named", prompt_columns, completion_column)
    for name, columns in _COLUMNS.items():
        if set(columns) <= set(column_names):
            return DataFormat(name, ("prompt",) if name == "preference" else columns[:1], columns[-1])
    return None


def check_is_dataset(dataset: Any, name: str) -> None:
    """`TypeError` if it is no map-style dataset, `ValueError` if it is empty."""
    if not isinstance(dataset, Dataset):
        remedy = "Load one, such as `datasets.load_dataset('json', data_files=path, split='train')`."
        if isinstance(dataset, IterableDataset):
            remedy = "Every iteration answers all prompts anew: load it without `streaming=True`."
        elif isinstance(dataset, dict):  # a `DatasetDict` is one
            remedy = f"Pass one of its splits: {sorted(dataset)}."
        elif isinstance(dataset, list):
            remedy = "Make one with `Dataset.from_list(rows)`."
        raise TypeError(f"`{name}` must be a `datasets.Dataset`, got `{type(dataset).__name__}`. {remedy}")
    if len(dataset) == 0:
        raise ValueError(
            f"`{name}` is empty: at least one row is needed. See whether the file or the split is the right one, and "
            "what was filtered out of it."
        )


def check_dataset(
    dataset: Any, name: str, prompt_column: str | None = None, completion_column: str | None = None
) -> None:
    """As [`check_is_dataset`], and `ValueError` if it is a vision dataset, or in none of the accepted formats."""
    check_is_dataset(dataset, name)
    columns = dataset.column_names
    if media := sorted(_MEDIA_COLUMNS & set(columns)):
        raise ValueError(
            f"`{name}` has the column(s) {media}: vision datasets are not supported, since prompts go to the opponent "
            "as token ids. Use a text dataset, or remove the column(s)."
        )
    if detect_format(columns, prompt_column, completion_column) is None:
        if prompt_column is not None:
            raise ValueError(
                f"`{name}` has the columns {columns}, but `prompt_column={prompt_column!r}` and "
                f"`completion_column={completion_column!r}` name others. Several prompt columns are joined by '+'. Set "
                f"them to columns that the dataset has.{_similar((prompt_column, completion_column), columns)}"
            )
        known = sorted({column for names in _COLUMNS.values() for column in names})
        raise ValueError(
            f"`{name}` has the columns {columns}, which is none of the accepted formats:\n{ACCEPTED_FORMATS}\nName "
            "them with `prompt_column` and `completion_column`, or rename them with "
            f"`dataset.rename_columns({{...}})`.{_similar(known, columns)}"
        )


def _similar(wanted: Iterable[str], columns: list[str]) -> str:
    """A hint where a column is spelled almost like one that is looked for."""
    lowered = {column.lower(): column for column in columns}
    for name in wanted:
        for found in get_close_matches(name.lower(), lowered, n=1, cutoff=0.8):
            if lowered[found] != name:
                return f" Is {lowered[found]!r} a misspelling of {name!r}?"
    return ""
