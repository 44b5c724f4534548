"""What a server is asked for a completion, and what its answer must hold to be one.

Nothing that fails this is ever trained on.
"""

import math
from typing import Any

from ..sampler import Completion, CompletionRequest, SamplerError, SamplingParams


def completion_body(
    name: str, request: CompletionRequest, params: SamplingParams, context_length: int, logprobs: bool
) -> dict[str, Any]:
    """What to ask the model `name` for. Every parameter is sent, so that no server's defaults slip in."""
    body = {
        "model": name,
        "prompt": request.prompt_ids,
        "seed": request.seed,
        "max_tokens": min(params.max_completion_length, context_length - len(request.prompt_ids)),
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": 0.0,
        "repetition_penalty": params.repetition_penalty,
        "stop_token_ids": list(params.end_token_ids),
        "return_token_ids": True,
    }
    if logprobs:
        body["logprobs"] = 0
    return {**body, **params.extra}


def read_completion(
    choice: dict[str, Any],
    request: CompletionRequest,
    params: SamplingParams,
    max_tokens: int,
    vocab_size: int | None,
    logprobs: bool,
) -> Completion:
    """
    The completion that a server's `choice` holds, when `max_tokens` were asked for and, if `logprobs`, their log-probs.

    Raises:
        `SamplerError`: if it is none, with what came back, what was expected and what to do.
    """
    token_ids, finish_reason = choice.get("token_ids"), choice.get("finish_reason")
    values = (choice.get("logprobs") or {}).get("token_logprobs") if logprobs else None

    def wrong(found: str, remedy: str) -> SamplerError:
        row, sample = request.key
        return SamplerError(
            f"The server's answer to row {row} (sample {sample}, prompt of {len(request.prompt_ids)} tokens) is no "
            f"completion: it holds {found[:500]}. {remedy}"
        )

    if not isinstance(token_ids, list) or not token_ids:
        raise wrong(
            f"`token_ids` {token_ids!r} instead of the ids sampled, at least one",
            "The server must heed `return_token_ids`, as vLLM from 0.22 on does: update it.",
        )
    for token_id in token_ids:
        if not isinstance(token_id, int) or not 0 <= token_id < (vocab_size or math.inf):
            raise wrong(
                f"the token id {token_id!r}, but the model has a vocabulary of {vocab_size}",
                "The server must serve the very model that is trained, with the same vocabulary.",
            )
    if len(token_ids) > max_tokens:
        raise wrong(
            f"{len(token_ids)} tokens, but at most {max_tokens} were asked for",
            "See whether something between here and the server changes requests.",
        )
    if finish_reason not in ("stop", "length"):
        raise wrong(
            f"`finish_reason` {finish_reason!r} instead of 'stop' or 'length'",
            "See the server's log, and what `generation_kwargs` asks of it.",
        )
    stops_elsewhere = {"stop", "stop_token_ids"} & params.extra.keys()  # where the user says
    if finish_reason == "stop" and token_ids[-1] not in params.end_token_ids and not stops_elsewhere:
        raise wrong(
            f"an answer that stopped at token {token_ids[-1]}, but the end tokens are {list(params.end_token_ids)}",
            "If the model does stop there, name the token in `eos_token_id` of its generation_config.json, as a list.",
        )
    if logprobs and not _is_finite(values, len(token_ids)):
        raise wrong(
            f"the log-probs {values!r} instead of a finite number for each of {len(token_ids)} tokens",
            "The server must heed `logprobs`, as vLLM does; without them set `publish_check_tolerance=None`.",
        )
    return Completion(request.key, token_ids, finish_reason, values)


def _is_finite(values: Any, length: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == length
        and all(isinstance(value, int | float) and math.isfinite(value) for value in values)
    )
