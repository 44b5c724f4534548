"""What went wrong between here and a vLLM server, in words: what was asked, what came back, and what to do."""

import json
from collections import Counter
from collections.abc import Collection
from typing import Any

from ..sampler import SamplerError
from .attempts import Attempts, Progress


class UnknownModelError(SamplerError):
    """The server does not have the model that was to answer."""


class UnreachableError(SamplerError):
    """The server is gone, or hangs. Another one may answer instead."""


def no_address(base_url: str, reason: str) -> SamplerError:
    return SamplerError(
        f"{base_url!r} is no address of a server: {reason}. Set `vllm_server_base_url` to one such as "
        "'http://localhost:8000'."
    )


def refusal(base_url: str, method: str, path: str, status: int, text: str) -> SamplerError:
    kind = UnknownModelError if (status, path) == (404, "/v1/completions") else SamplerError
    return kind(
        f"The vLLM server at {base_url} refused {method} {path}. HTTP {status}: {server_message(text)}"
        f"{_remedy(method, status)}"
    )


def no_vllm(base_url: str, method: str, path: str, text: str, expected: str = "JSON") -> SamplerError:
    return SamplerError(
        f"What answers at {base_url} is no vLLM server: {method} {path} gave {server_message(text)!r}, "
        f"expected {expected}. Correct `vllm_server_base_url`."
    )


def no_completion(base_url: str, path: str, answer: Any) -> SamplerError:
    return SamplerError(
        f"The vLLM server at {base_url} answered POST {path} with no completion where one was asked for: "
        f"{server_message(json.dumps(answer))}. See its log, and what `generation_kwargs` asks of it."
    )


def no_answer(base_url: str, method: str, path: str, request_timeout: float) -> UnreachableError:
    return UnreachableError(
        f"The vLLM server at {base_url} gave no answer within `vllm_request_timeout` ({request_timeout:g} s) to "
        f"{method} {path}. Raise it if single answers take that long; otherwise the server hangs: see its log and "
        "restart it."
    )


def unreachable(base_url: str, method: str, path: str, server_timeout: float, attempts: Attempts) -> UnreachableError:
    return UnreachableError(
        f"The vLLM server at {base_url} did not answer {method} {path} within `vllm_server_timeout` "
        f"({server_timeout:g} s): {attempts.num_failed} attempts, the last {attempts.elapsed:.1f} s after the first. "
        f"Last problem: {attempts.problem}. Start it with `python -m spin_trl.serve MODEL`, or correct "
        "`vllm_server_base_url`."
    )


def no_progress(base_url: str, progress: Progress, in_flight: Collection[Attempts]) -> UnreachableError:
    waiting = Counter(attempts.waiting_for for attempts in in_flight)
    shown = "; ".join(f"{count} for {what}" for what, count in waiting.most_common(3))
    return UnreachableError(
        f"Not one completion came back from the vLLM server at {base_url} within `vllm_progress_timeout` "
        f"({progress.timeout:g} s). {len(in_flight)} requests are waiting: {shown}. See the server's log and restart "
        "it; if it is only slow, raise `vllm_progress_timeout` or lower `vllm_max_concurrent_requests`."
    )


def server_message(text: str) -> str:
    """The server's own words, at most a screenful."""
    return text.strip()[:1000] or "(empty answer)"


def _remedy(method: str, status: int) -> str:
    if status in (401, 403):
        return ". It expects another API key: set `vllm_api_key` or VLLM_API_KEY to the one it was started with."
    if method == "GET" and status == 404:
        return ". Expected is a vLLM server, which knows that path: correct `vllm_server_base_url`."
    return ""
