"""Which datasets can be played on, each accepted format read from a file, and how one row becomes games."""

import json
from typing import Any

import pytest
from datasets import load_dataset
from tiny_tokenizers import byte_tokenizer

from spin_trl.data.formats import check_dataset, detect_format
from spin_trl.data.games import InvalidRowError, split_row
from spin_trl.data.rendering import tokenize_dataset


USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello."}
SYSTEM = {"role": "system", "content": "Be brief."}
WRONG = {"role": "assistant", "content": "Go away."}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
RESULT = {"role": "tool", "content": "1"}


# Datasets

FORMATS = {
    "text": ("prompt_completion", {"prompt": "Hi", "completion": "Hello."}),
    "conversational": ("prompt_completion", {"prompt": [USER], "completion": [ASSISTANT]}),
    "messages": ("messages", {"messages": [USER, ASSISTANT]}),
    "uclaml": ("real", {"real": [USER, ASSISTANT], "generated": [USER, WRONG]}),
    "preference text": ("preference", {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go away."}),
    "preference": ("preference", {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [WRONG]}),
    "preference whole": ("preference", {"prompt": "Hi", "chosen": [USER, ASSISTANT], "rejected": [USER, WRONG]}),
    "preference implicit": ("preference", {"chosen": [USER, ASSISTANT], "rejected": [USER, WRONG]}),
    "chosen alone": ("preference", {"chosen": [USER, ASSISTANT]}),
    "gsm8k": ("named", {"question": "Hi", "answer": "Hello."}, "question", "answer"),
    "alpaca": ("named", {"instruction": "Hi", "input": "", "output": "Hello."}, "instruction+input", "output"),
}


@pytest.mark.parametrize("case", FORMATS.values(), ids=FORMATS)
def test_file_of_every_format_gives_the_same_game(case, tmp_path):
    """Text is played as it is, and conversations as their template renders them."""
    name, row, *columns = case
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row) + "\n")
    dataset = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    check_dataset(dataset, "train_dataset", *columns)
    assert detect_format(dataset.column_names, *columns).name == name
    tokenizer = byte_tokenizer("<|im_end|>", "qwen2_5", ["<|im_start|>"])
    (game,) = tokenize_dataset(dataset, tokenizer, (tokenizer.eos_token_id,), *columns).dataset
    asked = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(game["prompt_ids"]) == ("Hi" if isinstance(game["prompt"], str) else asked)
    assert tokenizer.decode(game["chosen_ids"]) == "Hello.<|im_end|>"


@pytest.mark.parametrize(
    ("columns", "named", "expected"),
    [
        (["real", "chosen", "messages", "prompt", "completion", "a", "b"], ("a", "b"), "named"),
        (["real", "chosen", "messages", "prompt", "completion"], (), "prompt_completion"),
        (["real", "chosen", "messages", "prompt"], (), "messages"),
        (["real", "chosen", "prompt"], (), "preference"),
        (["real", "prompt"], (), "real"),
        (["generated", "rejected", "prompt"], (), None),
        (["prompt", "completion"], ("question+hint", "completion"), None),
    ],
    ids=str,
)
def test_of_several_fitting_formats_the_first_documented_one_wins(columns, named, expected):
    for order in (columns, columns[::-1]):
        found = detect_format(order, *named)
        assert (found and found.name) == expected


# Rows: what is asked, and what is the ground truth


def sides(row: dict[str, Any], turns: str = "last", *columns) -> list[tuple]:
    """Prompt and ground truth of each game."""
    return [(game.prompt, game.completion) for game in split_row(row, detect_format(list(row), *columns), turns)]


@pytest.mark.parametrize("column", ["messages", "real", "chosen"])
def test_conversation_is_split_before_its_last_message_or_before_every_assistant_turn(column):
    messages = [SYSTEM, USER, CALL, RESULT, ASSISTANT, USER, ASSISTANT]
    assert sides({column: messages}) == [(messages[:-1], messages[-1:])]
    assert sides({column: messages}, "all") == [(messages[:turn], [messages[turn]]) for turn in (2, 4, 6)]
    opened_by_the_assistant = [ASSISTANT, USER, ASSISTANT]  # which answers nothing
    assert sides({column: opened_by_the_assistant}, "all") == [(opened_by_the_assistant[:2], [ASSISTANT])]


def test_separate_prompt_is_one_game_whatever_turns_it_holds_and_a_chosen_conversation_may_begin_with_it():
    """The prompt's empty keys are Arrow's."""
    row = {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]}
    assert sides(row, "all") == [(row["prompt"], row["completion"])]
    for prompt in ([USER], [{**USER, "name": None}]):
        assert sides({"prompt": prompt, "chosen": [USER, ASSISTANT], "rejected": "x"}) == [([USER], [ASSISTANT])]


def test_several_prompt_columns_are_joined_by_a_blank_line_and_empty_ones_left_out():
    for second, prompt in (("a b", "Sort.\n\na b"), ("", "Sort."), (" ", "Sort."), (None, "Sort.")):
        row = {"instruction": "Sort.", "input": second, "output": "done"}
        assert sides(row, "last", "instruction+input", "output") == [(prompt, "done")]
    assert sides({"a+b": "Hi", "c": "Hello."}, "last", "a+b", "c") == [("Hi", "Hello.")]  # a column's own name


def test_lone_surrogate_is_refused_by_name():
    """No file can hold one; what else is refused of a row is in test_bad_input.py."""
    with pytest.raises(InvalidRowError, match=r"`completion` is not valid Unicode: '.udc80' at character 1"):
        sides({"prompt": "a", "completion": "c\udc80"})
    with pytest.raises(InvalidRowError, match="the ground truth of `messages` is not valid Unicode"):
        sides({"messages": [USER, {"role": "assistant", "content": "\ud83d"}]})
