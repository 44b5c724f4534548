"""What the user's metrics are given, and the table that shows them."""

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from spin_trl.evaluation.held_out import ScoreTable, generation_metrics
from spin_trl.run_directory.completion_parts import COMPLETION_SCHEMA


def truths(tokenizer, rows: list[int], texts: list[str]) -> Dataset:
    return Dataset.from_dict(
        {
            "row": rows,
            "prompt": [f"prompt {row}" for row in rows],
            "chosen_ids": [encode(tokenizer, text) for text in texts],
        }
    )


def answers(tokenizer, rows: list[int], texts: list[str]) -> pa.Table:
    columns = {
        "row": rows,
        "sample": [0] * len(rows),
        "completion_ids": [encode(tokenizer, text) for text in texts],
        "finish_reason": ["stop"] * len(rows),
    }
    return pa.table(columns, schema=COMPLETION_SCHEMA)


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]


def test_metrics_get_prompts_references_and_generations_of_the_same_row(tokenizer):
    """The dataset may be in another order than the completions, which come sorted by row."""
    dataset = truths(tokenizer, [3, 1, 2], ["AA", "B", "CH"])
    completions = answers(tokenizer, [1, 2, 3], ["B", "D", "EH"])
    seen = []

    def compute(prompts, references, generations):
        seen.append((prompts, references, generations))
        return {"accuracy": 1 / 3}

    assert generation_metrics(compute, dataset, [completions], tokenizer) == {"accuracy": 1 / 3}
    assert seen == [(["prompt 1", "prompt 2", "prompt 3"], ["B", "CH", "AA"], ["B", "D", "EH"])]


def test_equal_ids_give_equal_text_without_special_tokens(tokenizer):
    texts = ["AA B", "CH D EH", "B"]
    dataset, completions = truths(tokenizer, [0, 1, 2], texts), answers(tokenizer, [0, 1, 2], texts)

    def compute(prompts, references, generations):
        assert references == generations == texts
        return {}

    assert generation_metrics(compute, dataset, [completions], tokenizer) == {}


def test_numbers_of_any_kind_become_floats(tokenizer):
    dataset, completions = truths(tokenizer, [0], ["B"]), answers(tokenizer, [0], ["B"])
    found = generation_metrics(lambda *_: {"count": 2, "share": np.float32(0.5)}, dataset, [completions], tokenizer)
    assert found == {"count": 2.0, "share": 0.5}
    assert {type(value) for value in found.values()} == {float}


@pytest.mark.parametrize("returned", [None, 0.5, {"accuracy": "0.5"}, {"accuracy": [0.5]}, {"accuracy": None}], ids=str)
def test_anything_but_a_dict_of_numbers_is_refused(tokenizer, returned):
    dataset, completions = truths(tokenizer, [0], ["B"]), answers(tokenizer, [0], ["B"])
    with pytest.raises(TypeError, match="`compute_generation_metrics` must return a dict of numbers") as refusal:
        generation_metrics(lambda *_: returned, dataset, [completions], tokenizer)
    assert repr(returned) in str(refusal.value)


# The table


def ends(line: str) -> list[int]:
    """Where the cells of a line end, those right of its label."""
    return [i for i in range(12, len(line)) if line[i] != " " and (i + 1 == len(line) or line[i + 1] == " ")]


def test_table_grows_by_one_aligned_line_as_each_opponent_is_evaluated():
    """A score that is missing leaves its cell empty."""
    lines = []
    table = ScoreTable(lines.append)
    table.add("start", {"nll": 2.0, "a_rather_long_name": 41.5})
    assert [line.split() for line in lines] == [["after", "nll", "a_rather_long_name"], ["start", "2.0000", "41.5000"]]
    table.add("iteration 10", {"nll": 1.5, "a_rather_long_name": 1234.25})
    assert lines[2].split() == ["iteration", "10", "1.5000", "1234.2500"]
    assert len({tuple(ends(line)) for line in lines}) == 1, "\n".join(lines)
    table.add("iteration 11", {"a_rather_long_name": 0.5})
    assert ends(lines[3]) == ends(lines[2])[1:]
