"""The user's datasets -> what the run plays on: rendered, without invalid rows and duplicates, and a report of both.

Knows nothing of models, servers and paths.
"""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import date, datetime, time
from functools import partial
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, Value
from transformers import PreTrainedTokenizerBase

from ..processes.ranks import main_process_first
from ..spin_config import SPINConfig
from .formats import detect_format
from .preferences import PREFERENCE_IDS, prepare_preferences
from .rendering import tokenize_dataset
from .token_rows import dataset_checksum, drop_duplicates, drop_long_prompts, percentile_length


logger = get_logger(__name__)


@dataclass
class RunData:
    """The rows that a run plays on, as token ids."""

    train: Dataset  # prompts and ground truths, see `rendering.TokenizedData`
    eval: Dataset | None
    preferences: Dataset | None  # the user's pairs, see `prepare_preferences`
    report: dict[str, Any]  # format and row counts, for `self_play.json`
    invalid_rows: list[dict[str, Any]]  # dataset, row number and reason of every row left out as invalid
    num_dropped: int = 0  # rows left out because their prompt leaves no room for an answer

    def fit_to(self, max_length: int, source: str) -> None:
        """Drop prompts that leave no room for a token in `max_length`, which `source` sets. Every process calls it."""
        given = [part for part in (self.train, self.eval) if part is not None]
        kept = main_process_first(lambda: [drop_long_prompts(part, max_length, source) for part in given])
        self.train, self.eval = kept[0], kept[-1] if self.eval is not None else None
        num_dropped = sum(map(len, given)) - sum(map(len, kept))
        self.num_dropped += num_dropped
        if num_dropped > 0:
            what = "row(s) whose prompt leaves no room for an answer in"
            logger.warning(f"Dropped {num_dropped} {what} {source} ({max_length} tokens).")

    def prompt_length(self, percentile: float) -> int:
        """A percentile of the prompts' lengths, in tokens: 0 is the shortest of all, 100 the longest."""
        lengths = [percentile_length(part, "prompt_ids", percentile) for part in (self.train, self.eval) if part]
        return min(lengths) if percentile == 0 else max(lengths)

    def describe(self) -> dict[str, Any]:
        """For `self_play.json`."""
        described = {
            **self.report,
            "train_checksum": dataset_checksum(self.train),
            "eval_checksum": None if self.eval is None else dataset_checksum(self.eval),
            "num_train_rows": len(self.train),
            "num_dropped_rows": self.num_dropped,
            "num_eval_rows": 0 if self.eval is None else len(self.eval),
        }
        if self.preferences is not None:
            described["preference_checksum"] = dataset_checksum(self.preferences, PREFERENCE_IDS)
            described["num_preference_rows"] = len(self.preferences)
        return described


def prepare_data(
    args: SPINConfig,
    tokenizer: PreTrainedTokenizerBase,
    end_token_ids: Collection[int],
    train_dataset: Dataset,
    eval_dataset: Dataset | None = None,
    preference_dataset: Dataset | None = None,
    context_length: int | None = None,
    day: date | None = None,
) -> RunData:
    """
    Render all datasets. Duplicates are dropped from the training data alone: every evaluation row counts. Preferences
    are fitted to the model's `context_length`, in tokens, the others by [`RunData.fit_to`], when the server's is known.
    `day` is today for templates that write it (Llama 3.2, GPT-OSS).

    Raises:
        `ValueError`: see [`rendering.tokenize_dataset`]; the message names the dataset.
    """
    tokenize = partial(
        tokenize_dataset,
        tokenizer=tokenizer,
        end_token_ids=end_token_ids,
        chat_template_kwargs=_on_the_day(day, tokenizer, args.chat_template_kwargs),
        skip_invalid_rows=args.skip_invalid_rows,
        num_proc=args.dataset_num_proc,
    )
    columns = {"prompt_column": args.prompt_column, "completion_column": args.completion_column}
    given = {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "preference_dataset": preference_dataset}
    prepared, invalid_rows = dict.fromkeys(given), []
    for name, dataset in given.items():
        if dataset is None:
            continue
        try:
            if name == "preference_dataset":
                limit = context_length if args.max_length is None else min(args.max_length, context_length)
                prepared[name], invalid = prepare_preferences(tokenize, dataset, limit)
            else:
                prepared[name], invalid = tokenize(dataset, train_on_turns=args.train_on_turns, **columns)
        except ValueError as error:
            error.add_note(f"In `{name}`.")
            raise
        invalid_rows += [{"dataset": name, "row": row, "reason": reason} for row, reason in invalid]
    train = drop_duplicates(prepared["train_dataset"])
    num_duplicates = len(prepared["train_dataset"]) - len(train)
    _warn(num_duplicates, invalid_rows, train.features["prompt"] == Value("string") and bool(tokenizer.chat_template))
    report = {
        "format": detect_format(train_dataset.column_names, **columns).name,
        "num_source_rows": len(train_dataset),
        "num_invalid_rows": sum(row["dataset"] != "preference_dataset" for row in invalid_rows),
        "num_duplicate_rows": num_duplicates,
    }
    preferences = prepared["preference_dataset"]
    if preferences is not None:
        report["num_dropped_preference_rows"] = len(preference_dataset) - len(preferences)
    return RunData(train, prepared["eval_dataset"], preferences, report, invalid_rows)


def _on_the_day(
    day: date | None, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Arguments with which a template writes that day's date: a run that goes on tomorrow has the prompts of today."""
    if day is None or "strftime_now" not in str(tokenizer.chat_template):
        return template_kwargs
    return {"strftime_now": datetime.combine(day, time()).strftime, **(template_kwargs or {})}


def _warn(num_duplicates: int, invalid_rows: list[dict[str, Any]], is_text_for_chat: bool) -> None:
    if num_duplicates:
        logger.warning(f"Dropped {num_duplicates} row(s) of `train_dataset` that repeat an earlier one.")
    if invalid_rows:
        logger.warning(
            f"Left out {len(invalid_rows)} invalid row(s), listed in `invalid_rows.jsonl` of the run directory. The "
            f"first: row {invalid_rows[0]['row']} of `{invalid_rows[0]['dataset']}`, {invalid_rows[0]['reason']}"
        )
    if is_text_for_chat:
        logger.warning(
            "The tokenizer has a chat template, but `train_dataset` is text, which is played without it. If users of "
            "the model will chat with it, make messages of each row: `{'prompt': [{'role': 'user', 'content': ...}], "
            "'completion': [{'role': 'assistant', 'content': ...}]}`."
        )
