"""How one row becomes games, and what the refusal of a row says."""

from typing import Any

import pytest

from spin_trl.data.formats import detect_format
from spin_trl.data.games import Game, InvalidRowError, split_row


USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
RESULT = {"role": "tool", "content": "1"}


def games(row: dict[str, Any], turns: str = "last", prompt_column=None, completion_column=None) -> list[Game]:
    return split_row(row, detect_format(list(row), prompt_column, completion_column), turns)


def sides(row: dict[str, Any], *args) -> list[tuple]:
    """Prompt and ground truth of each game."""
    return [(game.prompt, game.completion) for game in games(row, *args)]


# What is asked, and what is the ground truth


def test_text_row_is_its_prompt_and_completion():
    assert sides({"prompt": "Hi", "completion": " Hello."}) == [("Hi", " Hello.")]


@pytest.mark.parametrize("column", ["messages", "real", "chosen"])
def test_conversation_is_split_before_its_last_message(column):
    messages = [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]
    assert sides({column: messages}) == [(messages[:-1], messages[-1:])]


@pytest.mark.parametrize("column", ["messages", "real", "chosen"])
def test_every_assistant_turn_is_a_game_if_asked(column):
    messages = [SYSTEM, USER, CALL, RESULT, ASSISTANT, USER, ASSISTANT]
    assert sides({column: messages}, "all") == [(messages[:turn], [messages[turn]]) for turn in (2, 4, 6)]


def test_assistant_turn_that_opens_a_conversation_answers_nothing_and_is_no_game():
    messages = [ASSISTANT, USER, ASSISTANT]
    assert sides({"messages": messages}, "all") == [(messages[:2], messages[2:])]


def test_separate_prompt_is_one_game_whatever_turns_it_holds():
    row = {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]}
    assert sides(row, "all") == [(row["prompt"], row["completion"])]


def test_assistant_message_that_only_calls_a_tool_is_a_ground_truth():
    assert sides({"messages": [USER, CALL]}) == [([USER], [CALL])]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Hi", "chosen": "Hello."}, ("Hi", "Hello.")),
        ({"prompt": [USER], "chosen": [ASSISTANT]}, ([USER], [ASSISTANT])),
        ({"prompt": [USER], "chosen": [USER, ASSISTANT]}, ([USER], [ASSISTANT])),
        ({"prompt": "Hi", "chosen": [USER, ASSISTANT]}, ([USER], [ASSISTANT])),
        ({"chosen": [USER, ASSISTANT, USER, ASSISTANT]}, ([USER, ASSISTANT, USER], [ASSISTANT])),
        ({"prompt": [{**USER, "name": None}], "chosen": [USER, ASSISTANT]}, ([USER], [ASSISTANT])),
    ],
    ids=["text", "answer alone", "whole", "whole beside text", "no prompt", "empty keys of Arrow"],
)
def test_chosen_side_of_preference_data_is_the_ground_truth_with_or_without_its_prompt(row, expected):
    assert sides({**row, "rejected": "whatever"}) == [expected]


def test_named_columns_are_prompt_and_ground_truth():
    assert sides({"question": "2+2?", "answer": "4"}, "last", "question", "answer") == [("2+2?", "4")]


@pytest.mark.parametrize(("input", "prompt"), [("a b", "Sort.\n\na b"), ("", "Sort."), (" ", "Sort."), (None, "Sort.")])
def test_several_prompt_columns_are_joined_by_a_blank_line_and_empty_ones_left_out(input, prompt):
    row = {"instruction": "Sort.", "input": input, "output": "done"}
    assert sides(row, "last", "instruction+input", "output") == [(prompt, "done")]


def test_column_whose_own_name_has_a_plus_is_taken_as_it_is():
    assert sides({"a+b": "Hi", "c": "Hello."}, "last", "a+b", "c") == [("Hi", "Hello.")]


# Refusals: here those that no file can hold, the others are in test_bad_input.py


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": "a\ud800b", "completion": "c"}, "`prompt`"),
        ({"prompt": "a", "completion": "c\udc80"}, "`completion`"),
        ({"messages": [USER, {"role": "assistant", "content": "\ud83d"}]}, "the ground truth of `messages`"),
    ],
)
def test_lone_surrogate_is_refused_by_name(row, name):
    with pytest.raises(InvalidRowError, match=f"{name} is not valid Unicode: '.ud[0-9a-f]+' at character [01]"):
        games(row)
