"""Which datasets can be played on, each accepted format read from a file, and what the refusal of any other says."""

import json

import pytest
from datasets import Dataset, load_dataset
from tiny_tokenizers import byte_tokenizer

from spin_trl.data.formats import ACCEPTED_FORMATS, check_dataset, detect_format
from spin_trl.data.rendering import tokenize_dataset


USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello."}
WRONG = {"role": "assistant", "content": "Go away."}


# Every accepted format, as a file


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


def test_every_format_is_among_those_that_a_refusal_names():
    for columns in ("`prompt` and `completion`", "`messages`", "`chosen`", "`real`", "`prompt_column`"):
        assert columns in ACCEPTED_FORMATS


@pytest.mark.parametrize(
    ("columns", "named", "expected"),
    [
        (["real", "chosen", "messages", "prompt", "completion", "a", "b"], ("a", "b"), "named"),
        (["real", "chosen", "messages", "prompt", "completion"], (), "prompt_completion"),
        (["real", "chosen", "messages", "prompt"], (), "messages"),
        (["real", "chosen", "prompt"], (), "preference"),
        (["real", "prompt"], (), "real"),
        (["generated", "rejected", "prompt"], (), None),
    ],
    ids=str,
)
def test_of_several_fitting_formats_the_first_documented_one_wins(columns, named, expected):
    found = detect_format(columns, *named)
    assert (found and found.name) == expected
    found = detect_format(columns[::-1], *named)
    assert (found and found.name) == expected


def test_named_columns_that_are_missing_are_refused_whatever_other_format_fits():
    dataset = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    with pytest.raises(ValueError, match=r"\['prompt', 'completion'\], but `prompt_column='question\+hint'` and"):
        check_dataset(dataset, "train_dataset", "question+hint", "completion")


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
