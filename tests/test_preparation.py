"""What of the user's data a run plays on, and what is said about the rest."""

import pytest
from datasets import Dataset
from tiny_tokenizers import letter_tokenizer

from spin_trl.data.preparation import prepare_data
from spin_trl.data.token_rows import drop_duplicates, drop_long_prompts, percentile_length


def rows(*texts: str) -> Dataset:
    """Rows of "prompt-completion"."""
    pairs = [text.split("-") for text in texts]
    return Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in pairs])


# Duplicates


def test_only_the_first_of_rows_with_the_same_prompt_and_ground_truth_is_kept():
    sides = {"prompt_ids": [[1, 2], [1], [1, 2], [1, 2], [1]], "chosen_ids": [[3], [2, 3], [4], [3], [2, 3]]}
    assert drop_duplicates(Dataset.from_dict({"row": range(5), **sides}))["row"][:] == [0, 1, 2]


def test_training_data_loses_its_duplicates_and_evaluation_data_keeps_them(make_config):
    data = prepare_data(make_config(), letter_tokenizer(), (1,), rows("a-b", "a-b", "a-c"), rows("d-e", "d-e"))
    assert data.train["source_row"][:] == [0, 2]
    assert len(data.eval) == 2
    assert data.report["num_duplicate_rows"] == 1


def test_invalid_rows_are_counted_and_listed_by_dataset(make_config):
    config = make_config(skip_invalid_rows=True)
    data = prepare_data(config, letter_tokenizer(), (1,), rows("a-b", "a-"), rows("-b", "d-e"))
    listed = [(row["dataset"], row["row"], row["reason"].split(".")[0]) for row in data.invalid_rows]
    assert listed == [("train_dataset", 1, "`completion` is empty"), ("eval_dataset", 0, "`prompt` is empty")]
    assert data.report == {
        "format": "prompt_completion",
        "num_source_rows": 2,
        "num_invalid_rows": 2,
        "num_duplicate_rows": 0,
    }


TEMPLATE = "{% for m in messages %}{{ m.content }}{% if m.role != 'user' %}</s>{% endif %}{% endfor %}"
MESSAGES = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]


@pytest.mark.parametrize(
    ("chat_template", "dataset", "is_told"),
    [(TEMPLATE, rows("a-b"), True), (None, rows("a-b"), False), (TEMPLATE, Dataset.from_list(MESSAGES), False)],
    ids=["text for a chat model", "text for a base model", "messages"],
)
def test_text_that_a_chat_model_plays_without_its_template_is_told(
    make_config, caplog, chat_template, dataset, is_told
):
    prepare_data(make_config(), letter_tokenizer(chat_template=chat_template), (1,), dataset)
    assert ("make messages of each row" in caplog.text) is is_told


def test_settings_of_the_data_reach_its_rows(make_config):
    config = make_config(prompt_column="question+hint", completion_column="answer")
    dataset = Dataset.from_list([{"question": "ab", "hint": "c", "answer": "d"}])
    data = prepare_data(config, letter_tokenizer(), (1,), dataset)
    assert data.train["prompt"][:] == ["ab\n\nc"]
    assert data.report["format"] == "named"


# Lengths


def test_percentile_of_the_lengths_is_interpolated_and_rounded_up_over_many_batches():
    """1,980 lengths of 1, then 20 of 5: position 0.99 * 1999 = 1979.01 lies 0.01 on the way from 1 to 5."""
    dataset = Dataset.from_dict({"ids": [[0]] * 1980 + [[0] * 5] * 20})
    assert [percentile_length(dataset, "ids", percentile) for percentile in (0, 98, 99, 100)] == [1, 1, 2, 5]


def test_prompts_that_leave_no_room_for_a_token_are_dropped():
    dataset = Dataset.from_dict({"row": [0, 1, 2, 3], "prompt_ids": [[0] * length for length in (3, 4, 5, 2)]})
    assert drop_long_prompts(dataset, 5, "the context")["row"][:] == [0, 1, 3]
