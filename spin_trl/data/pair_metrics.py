"""Numbers by which one sees what an opponent said and what it thinks of the data. Knows nothing of models and files."""

from collections.abc import Collection, Iterable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .columns import joined, lengths_of, numbers
from .pair_dataset import PREFERENCE, TRUTH, PairDataset, column_lengths


_NUM_DISTINCT_SAMPLED = 2000  # pairs: distinct-n falls as texts are added, so it always looks at as many
_PERCENTILES = (10, 50, 90)
_SIDES = ("chosen", "rejected")


def describe_pairs(
    pairs: PairDataset, is_identical: np.ndarray, completions: Iterable[pa.Table], seed: int, max_length: int | None
) -> dict[str, float | dict[str, float]]:
    """
    What the opponent said, beside what the data says: of the pairs as made, identical ones included, and of its
    completions. The `seed` is of the sample over which distinct-n is taken: the same pairs in every iteration.

    Returns:
        `dict`: `num_pairs`; `identical_share`; `empty_share`, of answers that say nothing (no token at all, or an end
        token alone); `cut_off_share`, of those that ran into the length limit. Of each side the mean and percentiles
        of its lengths in tokens, and the share that DPOTrainer's collator truncates to `max_length` together with its
        prompt. `distinct_1`, `distinct_2` of the answers and `chosen_distinct_1`, `chosen_distinct_2` of the truths.
    """
    is_empty, is_cut_off = [], []
    for batch in completions:
        has_end_token = pc.equal(batch["finish_reason"], "stop").to_numpy()
        is_empty.append(lengths_of(batch["completion_ids"]) <= has_end_token)  # True is one token
        is_cut_off.append(pc.equal(batch["finish_reason"], "length").to_numpy())
    shares = {"identical_share": is_identical, "empty_share": joined(is_empty), "cut_off_share": joined(is_cut_off)}
    described = {"num_pairs": len(pairs), **{name: mask.mean().item() for name, mask in shares.items()}}
    size = min(len(pairs), _NUM_DISTINCT_SAMPLED)
    sampled = pairs.select(np.sort(np.random.default_rng(seed).choice(len(pairs), size=size, replace=False)))
    room = np.inf if max_length is None else max_length - column_lengths(pairs, "prompt_ids")
    for side, prefix in (("rejected", ""), ("chosen", "chosen_")):
        lengths = column_lengths(pairs, f"{side}_ids")
        percentiles = zip(_PERCENTILES, np.percentile(lengths, _PERCENTILES), strict=True)
        described[f"{side}_length"] = lengths.mean().item()
        described[f"{side}_lengths"] = {f"p{p}": float(value) for p, value in percentiles}
        described[f"{side}_truncated_share"] = (lengths > room).mean().item()
        texts = pa.concat_tables(sampled.batches([f"{side}_ids"]))[0].combine_chunks()
        described |= {f"{prefix}distinct_{n}": distinct(texts, n) for n in (1, 2)}
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
    What the opponent thinks of both sides of the pairs that were made in this iteration of a ground truth and a
    generation, whichever of the two is chosen.

    Args:
        scores (`Mapping[str, np.ndarray]`): `ref_chosen_logps` and `ref_rejected_logps`, each of shape `(len(pairs),)`.
        num_identical_dropped (`int`): Pairs of equal sides that were left out. Their gap is 0.
        max_length (`int`, *optional*), truncation_mode (`str`): As DPOTrainer's collator truncated before scoring.

    Returns:
        `dict`: `logps_gap`, the mean of `log p(y)/|y| - log p(y')/|y'|`, and `opponent_nll`, the mean of `-log p(y)`
        over all tokens of the ground truths `y`. Both in nats per token. A side of no tokens has no mean: such a pair
        does not count in the gap. Also `preference_share`, of the user's pairs in all, if there are such.
    """
    iterations = numbers(pairs.answers, "iteration")
    is_truth = np.array([[True], [False]]).repeat(len(pairs), axis=1)  # (2, N), as all below: chosen, rejected
    if "chosen_sample" in pairs.column_names:  # rewards chose
        is_truth = np.stack([numbers(pairs.answers, name) == TRUTH for name in ("chosen_sample", "sample")])
    lengths = np.stack([column_lengths(pairs, f"{side}_ids") for side in _SIDES])
    if max_length is not None:  # as far as they have log-probs, the first token of a sequence having none
        room = np.maximum(0, max_length - column_lengths(pairs, "prompt_ids"))
        lengths = np.minimum(lengths, max_length - 1 if truncation_mode == "keep_end" else room)
    logps = np.stack([scores[f"ref_{side}_logps"] for side in _SIDES]).astype(np.float64)
    # From here on the ground truth comes first, then the answer.
    counts = (iterations == iteration) & is_truth.any(axis=0)
    lengths, logps = (np.where(is_truth[1], sides[::-1], sides)[:, counts] for sides in (lengths, logps))
    both = (lengths > 0).all(axis=0)
    truth_mean, answer_mean = logps[:, both] / lengths[:, both]
    described = {}
    if (num_gaps := num_identical_dropped + int(both.sum())) > 0:
        described["logps_gap"] = float(np.sum(truth_mean - answer_mean) / num_gaps)
    if (num_tokens := lengths[0].sum()) > 0:
        described["opponent_nll"] = float(-logps[0].sum() / num_tokens)
    if (is_preference := iterations == PREFERENCE).any():
        described["preference_share"] = float(is_preference.mean())
    return described


def generation_rates(
    completions: Iterable[pa.Table], sampled_rows: Collection[int], seconds: float
) -> dict[str, float]:
    """
    Completions and tokens per second, of the `sampled_rows`, which took these seconds. A resumed run has others of its
    iteration on disk already.
    """
    sampled_rows = pa.array(sampled_rows, pa.int64())
    sampled = (batch.filter(pc.is_in(batch["row"], sampled_rows)) for batch in completions)
    lengths = joined(lengths_of(batch["completion_ids"]) for batch in sampled)
    if not len(lengths):
        return {}
    return {"completions_per_second": len(lengths) / seconds, "tokens_per_second": float(lengths.sum()) / seconds}


def distinct(token_ids: pa.ListArray, n: int) -> float:
    """Distinct-n (Li et al., 2016), n being 1 or 2: different n-grams over all n-grams, none over two of the texts."""
    tokens = token_ids.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    text = np.repeat(np.arange(len(token_ids)), token_ids.value_lengths().to_numpy(zero_copy_only=False))
    if n == 2:
        within = text[1:] == text[:-1]
        tokens = (tokens[:-1] << 32 | tokens[1:])[within]
    return len(np.unique(tokens)) / len(tokens) if len(tokens) else 0.0
