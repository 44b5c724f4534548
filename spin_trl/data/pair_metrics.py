"""Numbers by which one sees what an opponent said and what it thinks of the data. Knows nothing of models and files.

Datasets are read in batches of Arrow memory, so that an iteration of any size takes the memory of one batch.
"""

from collections.abc import Collection, Iterable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .columns import lengths_of, numbers
from .pair_dataset import PREFERENCE, TRUTH, PairDataset, column_lengths


_NUM_DISTINCT_SAMPLED = 2000  # pairs: distinct-n falls as texts are added, so it always looks at as many
_PERCENTILES = (10, 50, 90)
_SIDES = ("chosen", "rejected")


def describe_pairs(pairs: PairDataset, is_identical: np.ndarray, max_length: int | None = None) -> dict[str, float]:
    """
    How many pairs there are, as made, and which share of them is identical; mean lengths of both sides in tokens, and
    the share that DPOTrainer's collator truncates to `max_length` together with its prompt.
    """
    limit = np.inf if max_length is None else max_length
    prompts = column_lengths(pairs, "prompt_ids")
    described = {"num_pairs": len(pairs), "identical_share": is_identical.mean().item()}
    for side in _SIDES:
        lengths = column_lengths(pairs, f"{side}_ids")
        described[f"{side}_length"] = lengths.mean().item()
        described[f"{side}_truncated_share"] = (prompts + lengths > limit).mean().item()
    return described


def preference_share(pairs: PairDataset) -> dict[str, float]:
    """Which share of an iteration's training set are preference pairs, if any are."""
    is_preference = numbers(pairs.answers, "iteration") == PREFERENCE
    return {"preference_share": float(is_preference.mean())} if is_preference.any() else {}


def describe_generations(
    pairs: PairDataset, completions: Iterable[pa.Table], seed: int
) -> dict[str, float | dict[str, float]]:
    """
    What the opponent said, beside what the data says.

    Args:
        pairs ([`PairDataset`]): As made, the identical ones included.
        completions (`Iterable[pyarrow.Table]`): The opponent's, with `completion_ids` and `finish_reason`.
        seed (`int`): Of the sample over which distinct-n is taken. The same pairs are looked at in every iteration.

    Returns:
        `dict`: `empty_share` and `cut_off_share` of the answers; `distinct_1`, `distinct_2` of them, too, and
        `chosen_distinct_1`, `chosen_distinct_2` of the ground truths; `chosen_lengths` and `rejected_lengths`, each a
        dict of percentiles, in tokens.
    """
    described: dict = answer_shares(completions)
    size = min(len(pairs), _NUM_DISTINCT_SAMPLED)
    sampled = pairs.select(np.sort(np.random.default_rng(seed).choice(len(pairs), size=size, replace=False)))
    for side, prefix in (("rejected", ""), ("chosen", "chosen_")):
        texts = pa.concat_tables(sampled.batches([f"{side}_ids"]))[0].combine_chunks()
        described |= {f"{prefix}distinct_{n}": distinct(texts, n) for n in (1, 2)}
        values = np.percentile(column_lengths(pairs, f"{side}_ids"), _PERCENTILES)
        described[f"{side}_lengths"] = {f"p{p}": float(v) for p, v in zip(_PERCENTILES, values, strict=True)}
    return described


def describe_scores(
    pairs: PairDataset,
    scores: Mapping[str, np.ndarray],
    iteration: int,
    num_identical_dropped: int,
    max_length: int | None,
    truncation_mode: str,
) -> dict[str, float]:
    """
    What the reference, which is the opponent, thinks of both sides of the pairs that were made in this iteration of a
    ground truth and a generation, whichever of the two is chosen.

    Args:
        scores (`Mapping[str, np.ndarray]`): `ref_chosen_logps` and `ref_rejected_logps`, each of shape `(len(pairs),)`.
        num_identical_dropped (`int`): Pairs of equal sides that were left out. Their gap is 0.
        max_length (`int`, *optional*), truncation_mode (`str`): As DPOTrainer's collator truncated before scoring.

    Returns:
        `dict`: `logps_gap`, the mean of `log p(y)/|y| - log p(y')/|y'|`, and `opponent_nll`, the mean of `-log p(y)`
        over all tokens of the ground truths `y`. Both in nats per token. A side of no tokens has no mean: such a pair
        does not count in the gap.
    """
    is_truth = [np.ones(len(pairs), bool), np.zeros(len(pairs), bool)]
    if "chosen_sample" in pairs.column_names:  # rewards chose
        is_truth = [numbers(pairs.answers, name) == TRUTH for name in ("chosen_sample", "sample")]
    counts = (numbers(pairs.answers, "iteration") == iteration) & (is_truth[0] | is_truth[1])
    prompts = column_lengths(pairs, "prompt_ids")
    lengths = [
        _scored_lengths(prompts, column_lengths(pairs, f"{side}_ids"), max_length, truncation_mode) for side in _SIDES
    ]
    logps = [np.asarray(scores[f"ref_{side}_logps"], np.float64) for side in _SIDES]
    # (num_counted,) each: the ground truth's, then the answer's
    truth, answer = (np.where(is_truth[1], *sides)[counts] for sides in (lengths[::-1], lengths))
    truth_logps, answer_logps = (np.where(is_truth[1], *sides)[counts] for sides in (logps[::-1], logps))
    both = (truth > 0) & (answer > 0)
    gap = np.sum(truth_logps[both] / truth[both] - answer_logps[both] / answer[both])
    num_gaps = num_identical_dropped + int(both.sum())
    described = {"logps_gap": float(gap / num_gaps)} if num_gaps > 0 else {}
    if truth.sum() > 0:
        described["opponent_nll"] = float(-truth_logps.sum() / truth.sum())
    return described


def generation_rates(
    completions: Iterable[pa.Table], sampled_rows: Collection[int], seconds: float
) -> dict[str, float]:
    """
    Completions and tokens per second, of the `sampled_rows`, which took these seconds. A resumed run has others of its
    iteration on disk already.
    """
    sampled_rows = pa.array(sampled_rows, pa.int64())
    num_completions = num_tokens = 0
    for batch in completions:
        sampled = batch.filter(pc.is_in(batch["row"], sampled_rows))
        num_completions += len(sampled)
        num_tokens += int(lengths_of(sampled["completion_ids"]).sum())
    if num_completions == 0:
        return {}
    return {"completions_per_second": num_completions / seconds, "tokens_per_second": num_tokens / seconds}


def answer_shares(completions: Iterable[pa.Table]) -> dict[str, float]:
    """Shares of answers that say nothing, no token or an end token alone, and that the length limit cut off."""
    num_completions = num_empty = num_cut_off = 0
    for batch in completions:
        ended = pc.equal(batch["finish_reason"], "stop").to_numpy()
        num_completions += len(batch)
        num_empty += int(np.sum(lengths_of(batch["completion_ids"]) <= ended))  # True is one token
        num_cut_off += pc.sum(pc.equal(batch["finish_reason"], "length")).as_py()
    return {"empty_share": num_empty / num_completions, "cut_off_share": num_cut_off / num_completions}


def distinct(token_ids: pa.ListArray, n: int) -> float:
    """Distinct-n (Li et al., 2016), n being 1 or 2: different n-grams over all n-grams, none over two of the texts."""
    tokens = token_ids.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    text = np.repeat(np.arange(len(token_ids)), token_ids.value_lengths().to_numpy(zero_copy_only=False))
    if n == 2:
        within = text[1:] == text[:-1]
        tokens = (tokens[:-1] << 32 | tokens[1:])[within]
    return len(np.unique(tokens)) / len(tokens) if len(tokens) else 0.0


def _scored_lengths(prompts: np.ndarray, sides: np.ndarray, max_length: int | None, truncation_mode: str) -> np.ndarray:
    """How many tokens of each side have a log-prob after the collator has truncated prompt and side together."""
    if max_length is None:
        return sides
    if truncation_mode == "keep_end":
        return np.minimum(sides, max_length - 1)  # the first token of a sequence has none
    return np.clip(max_length - prompts, 0, sides)
