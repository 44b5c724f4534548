"""Pairs by rewards, where it is not always the ground truth that is chosen. Knows nothing of models and files.

SPIN's section 7 leaves the target of self-play, the ground truth, for one that moves. Two such:

`best_of`: of each prompt the ground truth is chosen, unless its best generation (the first of several that are equal)
has a strictly higher reward. Everything else with a strictly lower reward than the chosen one is rejected, each in a
pair of its own.

`reward_ranked`, the recipe `spin` of verl: the generation of the highest reward is chosen, that of the lowest
rejected, and the ground truth plays no part.

With either, equal rewards make no pair: where a rule says that both sides are right, neither is to be unlearned. Nor
does what has no reward (not-a-number here): a generation takes no part, a ground truth leaves out its prompt.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from ..columns import numbers
from ..draw import OPPONENT
from ..pair_dataset import TRUTH, PairDataset
from ..pairs import NoPairsError
from .judged_answers import REWARD_COLUMNS, exceeds, group_starts


class Ranks(NamedTuple):
    """Which side of each pair is which. A side is the position of an answer, `TRUTH` for the ground truth."""

    no_pair_share: float  # of the prompts
    owners: np.ndarray  # (num_pairs,): position of an answer to its prompt
    chosen: np.ndarray  # (num_pairs,)
    rejected: np.ndarray  # (num_pairs,)


def rank_answers(answers: PairDataset, pairing: str) -> Ranks:
    """
    Choose the sides of the pairs that rewards make, by "best_of" or "reward_ranked". The answers are every generation
    beside its ground truth, sorted by row, with `REWARD_COLUMNS`.
    """
    rows, truth, reward = (numbers(answers.answers, name) for name in ("row", *REWARD_COLUMNS))
    starts = group_starts(rows)
    prompt = np.repeat(np.arange(len(starts)), np.diff([*starts, len(rows)]))  # that each answer is to, by number
    known = ~np.isnan(reward)
    best = np.fmax.reduceat(reward, starts)  # of each prompt, as `worst` and the winners' positions
    winner = _first_of_each(known & ~exceeds(best[prompt], reward), prompt, len(starts))
    if pairing == "best_of":
        beaten = exceeds(best, truth[starts])[prompt]
        is_beating = beaten & (np.arange(len(reward)) == winner[prompt])
        kept = exceeds(np.where(beaten, best[prompt], truth), reward) | is_beating
        owners = np.flatnonzero(kept)
        chosen = np.where(beaten, winner[prompt], TRUTH)[kept]
        rejected = np.where(is_beating[kept], TRUTH, owners)  # the winner's own place is the ground truth's pair
    else:
        worst = np.fmin.reduceat(reward, starts)
        differ = exceeds(best, worst)
        owners = chosen = winner[differ]
        rejected = _first_of_each(known & ~exceeds(reward, worst[prompt]), prompt, len(starts))[differ]
    return Ranks(1 - len(np.unique(rows[owners])) / len(starts), owners, chosen, rejected)


def _first_of_each(mask: np.ndarray, group: np.ndarray, num_groups: int) -> np.ndarray:
    """The first position in each group where the mask is true, -1 where it nowhere is."""
    first = np.full(num_groups, -1)
    found = np.flatnonzero(mask)
    groups, positions = np.unique(group[found], return_index=True)
    first[groups] = found[positions]
    return first


def no_pairs(pairing: str) -> NoPairsError:
    """What to say where no prompt of an iteration makes a pair."""
    found = "no generation has another reward than its ground truth"
    remedy = "let more `num_generations` or a higher `temperature` vary them"
    if pairing == "reward_ranked":
        found = "all generations of each prompt have the same reward"
        remedy += ", or use `pairing='best_of'`, which has the ground truths too"
    return NoPairsError(
        f"No prompt of this iteration makes a pair: {found}. The policy is the last iteration's. To end the run here, "
        "start the same command with `stop_when_converged=True`. If that is too soon, see what the reward functions "
        f"return, and in a new run {remedy}."
    )


def ranked_pairs(answers: PairDataset, ranks: Ranks) -> Iterator[pa.Table]:
    """
    The pairs themselves, at least one, batch by batch. Their `sample` is the number of the rejected generation and
    `chosen_sample` that of the chosen one, `TRUTH` for the ground truth. Their rewards are in `REWARD_COLUMNS`.
    """
    owners = ranks.owners
    samples, truth, reward = (numbers(answers.answers, name) for name in ("sample", *REWARD_COLUMNS))
    truths = answers.truths.select_columns(["chosen_ids"]).rename_column("chosen_ids", "ids")
    generations = answers.answers.select_columns(["rejected_ids"]).rename_column("rejected_ids", "ids")
    sides = concatenate_datasets([truths, generations])
    values, ids = {}, []
    for side, name, prefix in ((ranks.chosen, "chosen_sample", "chosen"), (ranks.rejected, "sample", "rejected")):
        is_truth = side == TRUTH
        values[name] = np.where(is_truth, TRUTH, samples[side]).astype(np.int32)
        values[f"{prefix}_reward"] = np.where(is_truth, truth[owners], reward[side])
        own = sides.select(np.where(is_truth, owners, len(truths) + side))
        ids.append(own.rename_column("ids", f"{prefix}_ids"))
    keys = [name for name in ("iteration", "row", "source_row", OPPONENT) if name in answers.column_names]
    return PairDataset(*ids, answers.answers.select_columns(keys).select(owners), Dataset(pa.table(values))).batches()
