"""What went wrong between here and a vLLM server, in words: what was asked, what came back, and what to do."""

import json
from collections.abc import Mapping
from typing import Any

from ..sampler import SamplerError


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
        f"{method} {path}. Raise it if single answers take that long, or lower `vllm_max_concurrent_requests`; "
        "otherwise the server hangs: see its log and restart it."
    )


def unreachable(base_url: str, method: str, path: str, problem: str) -> UnreachableError:
    return UnreachableError(
        f"The vLLM server at {base_url} did not answer {method} {path}, however often it was asked. The last problem: "
        f"{problem}. Start it with `python -m spin_trl.serve MODEL`, correct `vllm_server_base_url`, or raise "
        "`vllm_server_timeout` if it needs longer to come back."
    )


def all_gone(seconds: float, problems: Mapping[str, str]) -> SamplerError:
    listed = "; ".join(f"{address}: {problem}" for address, problem in problems.items())
    return SamplerError(f"No vLLM server was there within `vllm_server_timeout` ({seconds:g} s). {listed}")


def lost_too_often(base_url: str, num_losses: int, loss: Exception) -> SamplerError:
    return SamplerError(
        f"The vLLM server at {base_url} lost the opponent {num_losses} times in a row without one completion in "
        f"between. The last time: {loss}. See its log for why it is restarted, and see that no other run publishes to "
        "it."
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
