"""Which datasets and rows can be played on, and what the refusal of any other says."""

import pytest
from datasets import Dataset, IterableDataset

from spin_trl.data import check_dataset, split_row


USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello."}


# The dataset as a whole


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "completion": "Hello."},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"messages": [USER, ASSISTANT]},
        {"prompt": "an id", "messages": [USER, ASSISTANT]},
        {"prompt": [USER], "completion": [ASSISTANT], "tools": "[]", "source": "a"},
    ],
    ids=lambda row: "+".join(row),
)
def test_dataset_in_an_accepted_format_passes(row):
    check_dataset(Dataset.from_list([row]), "train_dataset")


def test_streamed_dataset_is_refused_with_a_way_to_load_it():
    dataset = Dataset.from_list([{"prompt": "a", "completion": "b"}]).to_iterable_dataset()
    assert isinstance(dataset, IterableDataset)
    with pytest.raises(TypeError, match="`eval_dataset` is an `IterableDataset`.*`streaming=True`"):
        check_dataset(dataset, "eval_dataset")


@pytest.mark.parametrize(("value", "kind"), [([{"prompt": "a", "completion": "b"}], "list"), (None, "NoneType")])
def test_anything_but_a_dataset_is_refused_by_its_type(value, kind):
    with pytest.raises(TypeError, match=f"`train_dataset` must be a `datasets.Dataset`.*got `{kind}`"):
        check_dataset(value, "train_dataset")


@pytest.mark.parametrize("column", ["image", "images"])
def test_vision_dataset_is_refused_by_its_column(column):
    dataset = Dataset.from_list([{"prompt": "a", "completion": "b", column: "x.png"}])
    with pytest.raises(ValueError, match=rf"`train_dataset` has the column\(s\) \['{column}'\].*not supported"):
        check_dataset(dataset, "train_dataset")


@pytest.mark.parametrize("columns", [["instruction", "output"], ["prompt"], ["completion"], ["prompt", "chosen"]])
def test_missing_columns_are_refused_with_those_found_and_those_accepted(columns):
    dataset = Dataset.from_dict({name: ["a"] for name in columns})
    with pytest.raises(ValueError) as refusal:
        check_dataset(dataset, "eval_dataset")
    message = str(refusal.value)
    assert f"`eval_dataset` has the columns {columns}" in message
    assert "`prompt` and `completion`" in message and "`messages`" in message
    assert "rename_columns" in message


def test_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        check_dataset(Dataset.from_dict({"prompt": [], "completion": []}), "train_dataset")


# One row


def test_text_row_is_its_prompt_and_completion():
    assert split_row({"prompt": "Hi", "completion": " Hello."}, 0) == ("Hi", " Hello.")


def test_conversation_is_split_before_its_last_message():
    messages = [{"role": "system", "content": "Be brief."}, USER, ASSISTANT, USER, ASSISTANT]
    assert split_row({"messages": messages}, 0) == (messages[:-1], messages[-1:])


def test_assistant_message_that_only_calls_a_tool_is_a_ground_truth():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert split_row({"messages": [USER, call]}, 0) == ([USER], [call])


@pytest.mark.parametrize("field", ["prompt", "completion"])
@pytest.mark.parametrize("value", ["", " \n", []], ids=["empty", "blank", "no messages"])
def test_empty_field_is_refused_by_row_and_name(field, value):
    row = {"prompt": "a", "completion": "b", field: value}
    with pytest.raises(ValueError, match=f"Row 17: `{field}` is empty.*remove the row"):
        split_row(row, 17)


@pytest.mark.parametrize("content", ["", " ", None])
def test_message_without_content_is_refused_as_empty(content):
    with pytest.raises(ValueError, match="Row 17: `completion` is empty"):
        split_row({"messages": [USER, {"role": "assistant", "content": content}]}, 17)


def test_conversation_without_a_prompt_is_refused_as_empty():
    with pytest.raises(ValueError, match="Row 17: `prompt` is empty"):
        split_row({"messages": [ASSISTANT]}, 17)


@pytest.mark.parametrize("field", ["prompt", "completion"])
def test_missing_cell_is_refused_by_row_and_name(field):
    row = {"prompt": "a", "completion": "b", field: None}
    with pytest.raises(ValueError, match=f"Row 17: `{field}` must be text or a list of messages, found `NoneType`"):
        split_row(row, 17)


@pytest.mark.parametrize(("value", "kind"), [(None, "`NoneType`"), ([], "an empty list"), ("Hi", "text")])
def test_cell_that_is_no_conversation_is_refused_by_row(value, kind):
    with pytest.raises(ValueError, match=f"Row 17: `messages` must be a non-empty list of messages, found {kind}"):
        split_row({"messages": value}, 17)


def test_list_that_holds_no_messages_is_refused():
    with pytest.raises(ValueError, match="Row 17: `prompt` must be text or a list of messages"):
        split_row({"prompt": ["Hi"], "completion": [ASSISTANT]}, 17)


def test_message_whose_content_is_not_text_is_refused_by_row():
    parts = [{"type": "text", "text": "Hi"}]
    with pytest.raises(ValueError, match="Row 17"):
        split_row({"messages": [{"role": "user", "content": parts}, ASSISTANT]}, 17)


@pytest.mark.parametrize(
    ("prompt", "completion", "found"),
    [
        ("Hi", [ASSISTANT], "prompt is text and its completion is a list of messages"),
        ([USER], "Hello.", "prompt is a list of messages and its completion is text"),
    ],
)
def test_text_mixed_with_messages_is_refused(prompt, completion, found):
    with pytest.raises(ValueError, match=f"Row 17 mixes formats: its {found}"):
        split_row({"prompt": prompt, "completion": completion}, 17)


def test_conversation_that_ends_on_a_user_turn_is_refused_by_that_role():
    with pytest.raises(ValueError, match="Row 17: `messages` ends on the role 'user'.*must be the assistant's"):
        split_row({"messages": [USER, ASSISTANT, USER]}, 17)


@pytest.mark.parametrize(
    ("completion", "roles"), [([ASSISTANT, ASSISTANT], r"\['assistant', 'assistant'\]"), ([USER], r"\['user'\]")]
)
def test_completion_that_is_not_one_assistant_message_is_refused_by_its_roles(completion, roles):
    with pytest.raises(ValueError, match=f"Row 17: `completion` must be exactly one assistant message.*{roles}"):
        split_row({"prompt": [USER], "completion": completion}, 17)
