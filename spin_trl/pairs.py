"""Completions -> preference pairs: the ground truth is chosen, the opponent's answer rejected. Knows no models."""

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets


PAIR_COLUMNS = ["iteration", "row", "source_row", "sample", "prompt_ids", "chosen_ids", "rejected_ids"]

# DPOTrainer's losses whose gradient on a pair of equal sides is zero, whatever the policy, and that look at each pair
# by itself: functions of the difference between the sides, and `apo_zero`, whose two terms cancel. (AOT compares the
# differences of a whole batch, where a zero does have its place.)
_BLIND_TO_IDENTICAL_PAIRS = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "apo_zero"}
_BLIND_TO_IDENTICAL_PAIRS |= {"exponential", "correlation"}  # SPIN's own


class NoPairsError(RuntimeError):
    """The opponent reproduces every ground truth: there is nothing left to tell apart."""


def make_pairs(dataset: Dataset, completions: pa.Table, iteration: int) -> Dataset:
    """
    Pair every completion with the ground truth of its row.

    Args:
        dataset ([`~datasets.Dataset`]): With the columns `row`, `source_row`, `prompt_ids` and `chosen_ids`.
        completions (`pyarrow.Table`): With the columns `row`, `sample` and `completion_ids`.
        iteration (`int`): The iteration whose opponent answered.

    Returns:
        [`~datasets.Dataset`] with the columns `PAIR_COLUMNS`.
    """
    position = {row: i for i, row in enumerate(dataset["row"])}
    completions = completions.filter(pc.is_in(completions["row"], pa.array(position)))
    truths = dataset.select_columns(["row", "source_row", "prompt_ids", "chosen_ids"])
    truths = truths.select([position[row] for row in completions["row"].to_pylist()])
    answers = pa.table(
        {
            "iteration": pa.array([iteration] * len(completions), pa.int32()),
            "sample": completions["sample"],
            "rejected_ids": completions["completion_ids"],
        }
    )
    return concatenate_datasets([truths, Dataset(answers)], axis=1).select_columns(PAIR_COLUMNS)


def keeps_identical_pairs(identical_pairs: str | None, loss_types: list[str]) -> bool:
    """
    Whether pairs whose two sides are equal are trained on.

    Args:
        identical_pairs (`str`, *optional*): "keep", "drop", or `None` for what the losses can use: such a pair
            moves the policy only if some loss judges the sides separately (`sft`, `bco_pair`, `nca_pair`, ...). A loss
            that is not known here is taken to be one of those.
        loss_types (`list[str]`): The losses that are mixed.
    """
    if identical_pairs is not None:
        return identical_pairs == "keep"
    return not set(loss_types) <= _BLIND_TO_IDENTICAL_PAIRS


def drop_identical_pairs(pairs: Dataset) -> Dataset:
    """
    Leave out the pairs whose two sides are equal.

    Raises:
        `NoPairsError`: if no pair is left.
    """
    sides = zip(pairs["chosen_ids"], pairs["rejected_ids"], strict=True)
    different = [i for i, (chosen, rejected) in enumerate(sides) if chosen != rejected]
    if not different:
        raise NoPairsError(
            f"The opponent reproduces the ground truth in all {len(pairs)} pairs of this iteration, so self-play has "
            "converged: there is nothing left to tell apart. The policy is the last iteration's. To go on, use more "
            "or other data, raise `temperature`, or set `identical_pairs='keep'`."
        )
    return pairs if len(different) == len(pairs) else pairs.select(different)


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


def describe_pairs(pairs: Dataset, completions: pa.Table, max_length: int | None = None) -> dict[str, float]:
    """
    Shares and mean lengths by which one sees how the opponent's answers compare with the ground truth.

    Args:
        pairs ([`~datasets.Dataset`]): As made, the identical ones included.
        completions (`pyarrow.Table`): The opponent's.
        max_length (`int`, *optional*): Length at which DPOTrainer's collator truncates a prompt with one side.
    """
    prompts, chosen, rejected = (list(pairs[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    cut_off = pc.sum(pc.equal(completions["finish_reason"], "length")).as_py() or 0
    return {
        "num_pairs": len(pairs),
        "chosen_length": sum(map(len, chosen)) / len(pairs),
        "rejected_length": sum(map(len, rejected)) / len(pairs),
        "chosen_truncated_share": _share_longer_than(max_length, prompts, chosen),
        "rejected_truncated_share": _share_longer_than(max_length, prompts, rejected),
        "cut_off_share": cut_off / len(completions),
        "identical_share": sum(c == r for c, r in zip(chosen, rejected, strict=True)) / len(pairs),
    }


def _share_longer_than(max_length: int | None, prompts: list[list[int]], sides: list[list[int]]) -> float:
    if max_length is None:
        return 0.0
    return sum(len(p) + len(s) > max_length for p, s in zip(prompts, sides, strict=True)) / len(sides)
