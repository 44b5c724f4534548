"""Completions -> preference pairs: the ground truth is chosen, the opponent's answer rejected. Knows no models."""

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets


PAIR_COLUMNS = ["iteration", "row", "sample", "prompt_ids", "chosen_ids", "rejected_ids"]


def make_pairs(dataset: Dataset, completions: pa.Table, iteration: int) -> Dataset:
    """
    Pair every completion with the ground truth of its row.

    Args:
        dataset ([`~datasets.Dataset`]): With the columns `row`, `prompt_ids` and `chosen_ids`.
        completions (`pyarrow.Table`): With the columns `row`, `sample` and `completion_ids`.
        iteration (`int`): The iteration whose opponent answered.

    Returns:
        [`~datasets.Dataset`] with the columns `PAIR_COLUMNS`.
    """
    position = {row: i for i, row in enumerate(dataset["row"])}
    completions = completions.filter(pc.is_in(completions["row"], pa.array(position)))
    truths = dataset.select_columns(["row", "prompt_ids", "chosen_ids"])
    truths = truths.select([position[row] for row in completions["row"].to_pylist()])
    answers = pa.table(
        {
            "iteration": pa.array([iteration] * len(completions), pa.int32()),
            "sample": completions["sample"],
            "rejected_ids": completions["completion_ids"],
        }
    )
    return concatenate_datasets([truths, Dataset(answers)], axis=1).select_columns(PAIR_COLUMNS)


def add_history(pairs: Dataset, previous: list[tuple[int, Dataset]]) -> Dataset:
    """
    Join the pairs that older opponents made to the new ones. They are to be scored anew, so their scores are left out.

    Args:
        pairs ([`~datasets.Dataset`]): The new ones.
        previous (`list[tuple[int, Dataset]]`): Iteration number and training set of each older iteration to join. Of
            each only the pairs that its own opponent made are taken.
    """
    own = [
        dataset.select_columns(PAIR_COLUMNS).filter(
            lambda origins, iteration=iteration: [origin == iteration for origin in origins],
            input_columns="iteration",
            batched=True,
            desc=f"Taking the pairs of iteration {iteration}",
        )
        for iteration, dataset in previous
    ]
    return concatenate_datasets([pairs, *own])


def describe_pairs(pairs: Dataset, completions: pa.Table) -> dict[str, float]:
    """Shares and mean lengths by which one sees how the opponent's answers compare with the ground truth."""
    chosen_lengths = [len(ids) for ids in pairs["chosen_ids"]]
    rejected_lengths = [len(ids) for ids in pairs["rejected_ids"]]
    identical = [c == r for c, r in zip(pairs["chosen_ids"], pairs["rejected_ids"], strict=True)]
    cut_off = pc.sum(pc.equal(completions["finish_reason"], "length")).as_py() or 0
    return {
        "num_pairs": len(pairs),
        "chosen_length": sum(chosen_lengths) / len(pairs),
        "rejected_length": sum(rejected_lengths) / len(pairs),
        "cut_off_share": cut_off / len(completions),
        "identical_share": sum(identical) / len(pairs),
    }
