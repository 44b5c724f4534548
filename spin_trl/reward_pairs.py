"""Pairs by rewards, where it is not always the ground truth that is chosen. Knows nothing of models and files.

SPIN's section 7 leaves the target of self-play, the ground truth, for one that moves. Two such:

`best_of`: of each prompt the ground truth is chosen, unless its best generation (the first of several that are equal)
has a strictly higher reward. Everything else with a strictly lower reward than the chosen one is rejected, each in a
pair of its own.

`reward_ranked`, the recipe `spin` of verl: the generation of the highest reward is chosen, that of the lowest
rejected, and the ground truth plays no part.

With either, equal rewards make no pair: where a rule says that both sides are right, neither is to be unlearned.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from .columns import batches, numbers
from .completion_parts import OPPONENT_FIELD
from .fictitious_play import OPPONENT
from .pair_dataset import TRUTH, PairDataset
from .pairs import ANSWER_SCHEMA, NoPairsError
from .reward_answers import REWARD_FIELDS, group_starts


# `sample` is the number of the rejected generation and `chosen_sample` that of the chosen one, `TRUTH` if that side is
# the ground truth.
RANKED_SCHEMA = pa.schema(
    [*ANSWER_SCHEMA, ("chosen_sample", pa.int32()), ("chosen_ids", pa.list_(pa.int32())), *REWARD_FIELDS]
)


def ranked_schema(has_opponents: bool) -> pa.Schema:
    """`RANKED_SCHEMA`, with `opponent` where several take part. All generations of a prompt are of the same."""
    return pa.schema([*RANKED_SCHEMA, OPPONENT_FIELD]) if has_opponents else RANKED_SCHEMA


def rank_pairs(answers: PairDataset, pairing: str) -> Iterator[pa.Table]:
    """
    The pairs that rewards make of ground truths and generations.

    Args:
        answers ([`PairDataset`]): Every generation beside its ground truth, sorted by row, with `REWARD_FIELDS`.
        pairing (`str`): "best_of" or "reward_ranked".

    Returns:
        `Iterator[pyarrow.Table]`: of [`ranked_schema`].

    Raises:
        [`NoPairsError`]: if all that could make a pair has the same reward.
    """
    rows, truth = numbers(answers.answers, "row"), numbers(answers.answers, "chosen_reward")
    reward = numbers(answers.answers, "rejected_reward")
    rank = _best_of if pairing == "best_of" else _best_and_worst
    owners, chosen, rejected = rank(group_starts(rows), truth, reward)
    if len(owners) == 0:
        raise NoPairsError(_no_pairs(pairing, len(group_starts(rows))))
    return _write(answers, owners, chosen, rejected, truth, reward)


def _best_of(starts: np.ndarray, truth: np.ndarray, reward: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Args:
        starts: Where each prompt's answers begin.
        truth, reward: Of each answer its ground truth's reward, and its own.

    Returns:
        For each pair the position of an answer to its prompt, and those of the chosen and of the rejected answer,
        `TRUTH` for the ground truth.
    """
    group = _groups(starts, len(reward))
    best = np.maximum.reduceat(reward, starts)
    beaten = (best > truth[starts])[group]
    is_winner = np.zeros(len(reward), bool)
    is_winner[_first_of_each(reward == best[group], group)] = True
    winner = np.flatnonzero(is_winner)[group]
    positions = np.arange(len(reward))
    kept = (reward < np.where(beaten, best[group], truth)) | (beaten & is_winner)
    chosen = np.where(beaten, winner, TRUTH)
    rejected = np.where(beaten & is_winner, TRUTH, positions)  # the winner's own place is the ground truth's pair
    return positions[kept], chosen[kept], rejected[kept]


def _best_and_worst(
    starts: np.ndarray, truth: np.ndarray, reward: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As [`_best_of`]."""
    group = _groups(starts, len(reward))
    best, worst = np.maximum.reduceat(reward, starts), np.minimum.reduceat(reward, starts)
    differ = best > worst
    chosen = _first_of_each(reward == best[group], group)[differ]
    rejected = _first_of_each(reward == worst[group], group)[differ]
    return chosen, chosen, rejected


def _no_pairs(pairing: str, num_prompts: int) -> str:
    if pairing == "best_of":
        return (
            f"No prompt of this iteration makes a pair: all generations of each of the {num_prompts} prompts have the "
            "reward of the ground truth, so there is nothing left to learn from these rewards. See what the reward "
            "functions return, or end the run here (`num_iterations`)."
        )
    return (
        f"No prompt of this iteration makes a pair: the generations of each of the {num_prompts} prompts all have the "
        "same reward, so none is better than another. See what the reward functions return, raise `num_generations` or "
        "`temperature`, or use `pairing='best_of'`, which has the ground truths too."
    )


def _groups(starts: np.ndarray, count: int) -> np.ndarray:
    """The number of the prompt that each answer is to."""
    return np.repeat(np.arange(len(starts)), np.diff([*starts, count]))


def _first_of_each(mask: np.ndarray, group: np.ndarray) -> np.ndarray:
    """The first position in each group where the mask is true. There has to be one."""
    found = np.flatnonzero(mask)
    return found[np.unique(group[found], return_index=True)[1]]


def _write(
    answers: PairDataset,
    owners: np.ndarray,
    chosen: np.ndarray,
    rejected: np.ndarray,
    truth: np.ndarray,
    reward: np.ndarray,
) -> Iterator[pa.Table]:
    samples = numbers(answers.answers, "sample")
    truths = answers.truths.select_columns(["chosen_ids"]).rename_column("chosen_ids", "ids")
    generations = answers.answers.select_columns(["rejected_ids"]).rename_column("rejected_ids", "ids")
    sides = concatenate_datasets([truths, generations])

    def ids_of(side: np.ndarray) -> Iterator[pa.Table]:
        return batches(sides.select(np.where(side == TRUTH, owners, len(truths) + side)), ["ids"])

    def of(side: np.ndarray, of_truth: np.ndarray | int, of_generation: np.ndarray) -> np.ndarray:
        return np.where(side == TRUTH, of_truth, of_generation[side])

    values = {
        "sample": of(rejected, TRUTH, samples),
        "chosen_sample": of(chosen, TRUTH, samples),
        "chosen_reward": of(chosen, truth[owners], reward),
        "rejected_reward": of(rejected, truth[owners], reward),
    }
    schema = ranked_schema(OPPONENT in answers.column_names)
    keys = batches(
        answers.answers.select(owners),
        [name for name in ("iteration", "row", "source_row", OPPONENT) if name in schema.names],
    )
    start = 0
    for key, chosen_ids, rejected_ids in zip(keys, ids_of(chosen), ids_of(rejected), strict=True):
        stop = start + len(key)
        columns = {name: key[name] for name in key.column_names}
        columns |= {name: value[start:stop] for name, value in values.items()}
        columns |= {"chosen_ids": chosen_ids["ids"], "rejected_ids": rejected_ids["ids"]}
        yield pa.table({name: columns[name] for name in schema.names}).cast(schema)
        start = stop


def describe_ranked(pairs: Dataset, answers: Dataset) -> dict[str, float]:
    """How many pairs were made, and which share of the prompts that were answered makes none."""
    num_prompts, num_paired = (len(np.unique(numbers(dataset, "row"))) for dataset in (answers, pairs))
    return {"num_pairs": len(pairs), "no_pair_share": 1 - num_paired / num_prompts}
