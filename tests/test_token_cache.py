"""When tokenised rows are found again, and when they must not be."""

import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset
from tiny_tokenizers import letter_tokenizer

from spin_trl.data import rendering
from spin_trl.data.rendering import RowRenderer, tokenize_dataset


@pytest.fixture
def num_rendered(monkeypatch) -> list[int]:
    """Counts the rows that are rendered, in its only entry."""
    count, render = [0], RowRenderer.render

    def counting(self, row):
        count[0] += 1
        return render(self, row)

    monkeypatch.setattr(RowRenderer, "render", counting)
    return count


@pytest.fixture
def on_disk(tmp_path) -> Dataset:
    Dataset.from_list([{"prompt": f"{letter}a", "completion": "b"} for letter in "abc"]).to_json(
        tmp_path / "rows.jsonl"
    )
    return load_dataset(
        "json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )


SCRIPT = """
import sys
from datasets import load_dataset
from tiny_tokenizers import letter_tokenizer
from spin_trl.rendering import RowRenderer, tokenize_dataset

def refuse(self, row):
    raise AssertionError("tokenised again")

RowRenderer.render = refuse
tokenizer = letter_tokenizer()
tokenizer.pad_token = tokenizer.eos_token
tokenizer(["a", "aaa"], padding=True, truncation=True, max_length=2)  # changes its state, but not what it renders
dataset = load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[2])
print(tokenize_dataset(dataset, tokenizer, (1,)).dataset["chosen_ids"][:])
"""


def test_another_process_does_not_tokenise_again(on_disk, tmp_path):
    tokenizer = letter_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    chosen_ids = tokenize_dataset(on_disk, tokenizer, (1,)).dataset["chosen_ids"][:]
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "rows.jsonl"), str(tmp_path / "cache")]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(chosen_ids)


def test_same_rows_are_tokenised_once_in_a_process_even_in_memory(num_rendered):
    rows = [{"prompt": "ab", "completion": "c"}, {"prompt": "b", "completion": "d"}]
    for _ in range(2):
        tokenized = tokenize_dataset(Dataset.from_list(rows), letter_tokenizer(), (1,)).dataset
    assert num_rendered == [2]
    assert tokenized.cache_files  # they lie in a file, not in memory


def with_another_end(tokenizer):
    tokenizer.chat_template = "{{ messages }}"
    return tokenizer


CHANGES = {
    "row": lambda settings: {**settings, "dataset": Dataset.from_list([{"prompt": "ab", "completion": "d"}])},
    "end token": lambda settings: {**settings, "end_token_ids": (2,)},
    "tokenizer": lambda settings: {**settings, "tokenizer": with_another_end(letter_tokenizer())},
    "invalid rows": lambda settings: {**settings, "skip_invalid_rows": True},
    "columns": lambda settings: {**settings, "prompt_column": "completion", "completion_column": "prompt"},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_rows_are_tokenised_again_where_they_could_come_out_otherwise(num_rendered, change):
    rows = Dataset.from_list([{"prompt": "ab", "completion": "c"}])
    settings = {"dataset": rows, "tokenizer": letter_tokenizer(), "end_token_ids": (1,)}
    tokenize_dataset(**settings)
    before = num_rendered[0]
    tokenize_dataset(**change(settings))
    assert num_rendered[0] == before + 1


def test_rows_are_tokenised_again_by_another_version_of_the_code(num_rendered, monkeypatch):
    rows = Dataset.from_list([{"prompt": "abc", "completion": "c"}])
    tokenize_dataset(rows, letter_tokenizer(), (1,))
    before, getsource = num_rendered[0], rendering.rendering_fingerprint.__globals__["inspect"].getsource
    monkeypatch.setattr("inspect.getsource", lambda module: getsource(module) + "# changed")
    tokenize_dataset(rows, letter_tokenizer(), (1,))
    assert num_rendered[0] == before + 1
