"""Does the server play the opponent that was published to it? Compares its log-probs with the policy's own.

Knows nothing of HTTP and of where opponents lie.
"""

from dataclasses import replace

import numpy as np
from datasets import Dataset

from ..generation.sampler import CompletionRequest, SamplerError, SamplingParams
from ..processes.ranks import on_main_process
from .opponents import Opponents


_NUM_COMPARED = 8  # completions of each opponent
_MOST_BY_QUANTIZATION = 0.5  # nats a token; another model differs by more
_HEADROOM = 1.5


def check_published(
    opponents: Opponents, iteration: int, dataset: Dataset, params: SamplingParams, tolerance: float
) -> float:
    """
    Have the opponent of an iteration, which the policy is and which has been published, answer a few prompts, and
    compare the server's log-probs with the policy's. Every process calls it.

    Returns:
        `float`: the mean absolute difference per token, in nats; with several servers the largest.

    Raises:
        `SamplerError`: if a server plays something else, with which the difference is above the `tolerance`.
    """
    args = opponents.args
    prompts = dataset.select(range(min(len(dataset), _NUM_COMPARED)))
    requests = [CompletionRequest((row["row"], 0), row["prompt_ids"], seed=args.seed + row["row"]) for row in prompts]
    # Log-probs are of the opponent itself, so it must be sampled as it is.
    params = replace(params, temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0, extra={})
    if args.max_length is not None:  # what is scored must not be truncated
        room = args.max_length - max(len(request.prompt_ids) for request in requests)
        params = replace(params, max_completion_length=min(params.max_completion_length, room))
    sampled = on_main_process(lambda: opponents.sampler.sample_each(requests, params, logprobs=True))
    opponents.turns.give_to_policy(briefly=True)
    prompt_ids = {request.key: request.prompt_ids for request in requests}
    differences = []
    for address, completions in sampled.items():
        rows = [{"prompt_ids": prompt_ids[c.key], "completion_ids": c.token_ids} for c in completions]
        of_server = np.concatenate([completion.logprobs for completion in completions])
        of_policy = np.concatenate(opponents.policy.completion_logps(rows))
        difference = float(np.abs(of_server - of_policy).mean())
        if not difference <= tolerance:  # nor is a NaN
            is_base = iteration == 0 and opponents.base_is_opponent
            opponent = "the base model" if is_base else f"iteration {iteration}'s opponent"
            raise SamplerError(
                f"{address} does not play {opponent}: over {len(of_server)} tokens of {len(rows)} sampled completions "
                f"its log-probs differ from the policy's by {difference:.3g} nats a token on average, more than "
                f"`publish_check_tolerance` ({tolerance:g}). It may serve another model or an older opponent (restart "
                "it with `python -m spin_trl.serve`), or compute in another precision (`--dtype`; then raise the "
                "tolerance)."
            )
        differences.append(difference)
    return max(differences)


def allow_for_quantization(tolerance: float, first_difference: float | None) -> float:
    """
    The tolerance where the policy alone is quantized: what the run's first opponent, with which nothing is stale yet,
    differed by, and half as much again; `None` where that is measured now. A stale opponent differs by more than that.
    `publish_check_tolerance` is the least.
    """
    return max(tolerance, _MOST_BY_QUANTIZATION if first_difference is None else _HEADROOM * first_difference)
