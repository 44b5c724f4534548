"""When tokenised rows are found again, and when they must not be."""

import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset
from tiny_tokenizers import CountingTokenizer, letter_tokenizer

from spin_trl.data.rendering import tokenize_dataset


SCRIPT = """
import sys
from datasets import load_dataset
from tiny_tokenizers import CountingTokenizer, letter_tokenizer
from spin_trl.data.rendering import tokenize_dataset

tokenizer = letter_tokenizer(kind=CountingTokenizer)
tokenizer.pad_token = tokenizer.eos_token
tokenizer(["a", "aaa"], padding=True, truncation=True, max_length=2)  # changes its state, but not what it renders
dataset = load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[2])
chosen_ids = tokenize_dataset(dataset, tokenizer, (1,)).dataset["chosen_ids"][:]
print(tokenizer.num_calls, chosen_ids)
"""


def test_another_process_does_not_tokenise_again(tmp_path):
    rows, cache = str(tmp_path / "rows.jsonl"), str(tmp_path / "cache")
    Dataset.from_list([{"prompt": f"{letter}a", "completion": "b"} for letter in "abc"]).to_json(rows)
    tokenizer = letter_tokenizer(kind=CountingTokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    dataset = load_dataset("json", data_files=rows, split="train", cache_dir=cache)
    chosen_ids = tokenize_dataset(dataset, tokenizer, (1,)).dataset["chosen_ids"][:]
    command = [sys.executable, "-c", SCRIPT, rows, cache]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"1 {chosen_ids}"


def num_rendered(**settings) -> int:
    """Calls of the tokenizer, two a row, when rows of letters are tokenised."""
    tokenizer = settings.setdefault("tokenizer", letter_tokenizer(kind=CountingTokenizer))
    settings.setdefault("dataset", Dataset.from_list([{"prompt": "ab", "completion": "c"}] * 2))
    tokenized = tokenize_dataset(**{"end_token_ids": (1,), **settings}).dataset
    assert tokenized.cache_files  # they lie in a file, not in memory
    return tokenizer.num_calls // 2


def test_same_rows_are_tokenised_once_in_a_process_even_in_memory():
    assert [num_rendered(prompt_column="prompt", completion_column="completion") for _ in range(3)] == [2, 0, 0]


CHANGES = {
    "row": lambda: {"dataset": Dataset.from_list([{"prompt": "ab", "completion": "d"}] * 2)},
    "end token": lambda: {"end_token_ids": (2,)},
    "tokenizer": lambda: {"tokenizer": letter_tokenizer(kind=CountingTokenizer, chat_template="{{ messages }}")},
    "invalid rows": lambda: {"skip_invalid_rows": True},
    "columns": lambda: {"prompt_column": "completion", "completion_column": "prompt"},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_rows_are_tokenised_again_where_they_could_come_out_otherwise(change):
    num_rendered()
    assert (num_rendered(), num_rendered(**change())) == (0, 2)
