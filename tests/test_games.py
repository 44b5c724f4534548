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


# Refusals


@pytest.mark.parametrize("field", ["prompt", "completion"])
@pytest.mark.parametrize("value", ["", " \n", []], ids=["empty", "blank", "no messages"])
def test_empty_field_is_refused_by_name(field, value):
    with pytest.raises(InvalidRowError, match=f"^`{field}` is empty.*remove the row"):
        games({"prompt": "a", "completion": "b", field: value})


@pytest.mark.parametrize("content", ["", " ", None])
def test_ground_truth_without_content_is_refused_as_empty(content):
    with pytest.raises(InvalidRowError, match="the ground truth of `messages` is empty"):
        games({"messages": [USER, {"role": "assistant", "content": content}]})


@pytest.mark.parametrize("turns", ["last", "all"])
def test_empty_assistant_turn_in_mid_conversation_is_refused(turns):
    messages = [USER, {"role": "assistant", "content": ""}, USER, ASSISTANT]
    with pytest.raises(InvalidRowError, match=r"`messages(\[1\])?`.* is empty"):
        games({"messages": messages}, turns)


@pytest.mark.parametrize("turns", ["last", "all"])
def test_conversation_without_a_prompt_is_refused_as_empty(turns):
    with pytest.raises(InvalidRowError, match="the prompt of `messages` is empty"):
        games({"messages": [ASSISTANT]}, turns)


def test_prompt_whose_named_columns_are_all_empty_is_refused_by_their_names():
    with pytest.raises(InvalidRowError, match=r"`instruction\+input` is empty"):
        games({"instruction": "", "input": None, "output": "x"}, "last", "instruction+input", "output")


@pytest.mark.parametrize("field", ["prompt", "completion"])
@pytest.mark.parametrize(("value", "kind"), [(None, "`NoneType`"), (3, "`int`"), ({"a": 1}, "`dict`")])
def test_cell_that_is_no_text_is_refused_by_name_and_kind(field, value, kind):
    with pytest.raises(InvalidRowError, match=f"`{field}` must be text or a list of messages, found {kind}"):
        games({"prompt": "a", "completion": "b", field: value})


def test_named_column_that_is_no_text_is_refused_by_name():
    with pytest.raises(InvalidRowError, match="`input` must be text to be joined, found `int`"):
        games({"instruction": "a", "input": 3, "output": "x"}, "last", "instruction+input", "output")


@pytest.mark.parametrize("column", ["messages", "real"])
@pytest.mark.parametrize(("value", "kind"), [(None, "`NoneType`"), ([], "an empty list"), ("Hi", "text")])
def test_cell_that_is_no_conversation_is_refused(column, value, kind):
    with pytest.raises(InvalidRowError, match=f"`{column}` must be a non-empty list of messages, found {kind}"):
        games({column: value})


@pytest.mark.parametrize(
    ("prompt", "kind"), [(["Hi"], "a list of `str`"), ([{"content": "Hi"}], "a list of `dict`"), ([USER, {}], "`dict`")]
)
def test_list_that_holds_no_messages_is_refused(prompt, kind):
    with pytest.raises(InvalidRowError, match=f"`prompt` must be text or a list of messages, found .*{kind}"):
        games({"prompt": prompt, "completion": [ASSISTANT]})


def test_message_whose_content_is_not_text_is_refused():
    parts = [{"type": "text", "text": "Hi"}]
    with pytest.raises(InvalidRowError, match="the prompt of `messages` has a message whose `content` is a list of"):
        games({"messages": [{"role": "user", "content": parts}, ASSISTANT]})


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"prompt": "Hi", "completion": [ASSISTANT]}, "`prompt` is text and `completion` is a list of messages"),
        ({"prompt": [USER], "completion": "Hello."}, "`prompt` is a list of messages and `completion` is text"),
        ({"prompt": "Hi", "chosen": [ASSISTANT]}, "`prompt` is text and `chosen` is a list of messages"),
    ],
)
def test_text_mixed_with_messages_is_refused(row, found):
    with pytest.raises(InvalidRowError, match=f"mixed formats: {found}"):
        games(row)


@pytest.mark.parametrize("column", ["messages", "real", "chosen"])
def test_conversation_that_ends_on_a_user_turn_is_refused_by_that_role(column):
    with pytest.raises(InvalidRowError, match=f"`{column}` ends on the role 'user'.*must be the assistant's"):
        games({column: [USER, ASSISTANT, USER]})


@pytest.mark.parametrize(
    ("completion", "roles"), [([ASSISTANT, ASSISTANT], r"\['assistant', 'assistant'\]"), ([USER], r"\['user'\]")]
)
def test_completion_that_is_not_one_assistant_message_is_refused_by_its_roles(completion, roles):
    with pytest.raises(InvalidRowError, match=f"`completion` must be exactly one assistant message.*{roles}"):
        games({"prompt": [USER], "completion": completion})


def test_chosen_text_without_a_prompt_is_refused_with_the_function_that_separates_them():
    with pytest.raises(InvalidRowError, match="`chosen` is text without a `prompt`.*trl.extract_prompt"):
        games({"chosen": "Human: Hi Assistant: Hello.", "rejected": "Human: Hi Assistant: No."})


def test_chosen_conversation_that_contradicts_its_prompt_is_refused():
    with pytest.raises(InvalidRowError, match="`chosen` is a whole conversation that does not begin with `prompt`"):
        games({"prompt": [SYSTEM], "chosen": [USER, ASSISTANT]})


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
