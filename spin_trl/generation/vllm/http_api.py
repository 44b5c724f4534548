"""The HTTP API of a stock vLLM server, as far as self-play needs it. The only file that knows it.

Checked against vLLM 0.31. Knows nothing of iterations, datasets or the trainer.
"""

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp

from ..sampler import SamplerError


# 4xx is the server's final word, except for these two; 5xx and a broken connection may pass.
_RETRIED_STATUS = (408, 429, *range(500, 600))
_BUSY_STATUS = (408, 429, 503)
# Seconds for an answer that takes a healthy server none to speak of. Later is as bad as never, and tried again.
_PROMPT_ANSWER = 30.0
_SHORTLY = 5.0  # seconds: more than a connection that went stale needs
_LARGEST_DELAY = 20  # times the first one

# Of its own: the run's random state must not depend on how often a server failed.
_jitter = random.Random()


class UnknownModelError(SamplerError):
    """The server does not have the model that was to answer."""


class UnreachableError(SamplerError):
    """The server is gone, or hangs. Another one may answer instead."""


class VLLMServer:
    """
    Client of one vLLM server. Its coroutines all run in one event loop.

    Args:
        base_url (`str`): Address, such as `"http://localhost:8000"`, or `"unix:"` and the path of a socket.
        api_key (`str`, *optional*): Sent as a bearer token.
        server_timeout (`float`): Seconds within which a server that is down must be back.
        request_timeout (`float`): Seconds within which some completion must come back while any is asked for, and
            within which each other request must be answered.
        delay (`float`): Seconds until a failed request is tried again, doubled each time up to 20 times as many.

    `patience` is for how many seconds after its first failure a request is tried again: `server_timeout`, unless it is
    set to less because another server may be asked instead.

    Every method raises [`SamplerError`] with the server's own message, or with what was tried, and
    [`UnreachableError`] if the server is gone or hangs. None waits without bound.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        server_timeout: float = 240.0,
        request_timeout: float = 600.0,
        delay: float = 0.5,
    ):
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.server_timeout = server_timeout
        self.request_timeout = request_timeout
        self.delay = delay
        self.patience = server_timeout
        self._socket = Path(base_url.removeprefix("unix:")) if base_url.startswith("unix:") else None
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None
        self._completed_at = 0.0  # when the last completion came

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    # What the server is

    async def wait_until_ready(self) -> None:
        """Return as soon as the server is healthy."""
        await self._call("GET", "/health", timeout=self._prompt)

    async def served_models(self) -> list[dict[str, Any]]:
        """The models served: `id`; of a base model also `root` (where it came from) and `max_model_len` (in tokens)."""

        def is_model(model: dict) -> bool:
            is_adapter = model.get("parent") is not None
            return isinstance(model["id"], str) and (is_adapter or isinstance(model["max_model_len"], int))

        expected = "a list of models with `id` and `max_model_len`"
        answer = await self._look("/v1/models", lambda answer: all(map(is_model, answer["data"])), expected)
        return answer["data"]

    async def adapter_refusal(self) -> str | None:
        """Why the server cannot load LoRA adapters at run time, or `None` if it can."""
        # An adapter that does not exist tells a server that would load it from one that would not.
        body = {"lora_name": "spin-trl-probe", "lora_path": "/nonexistent/spin-trl-probe"}
        status, answer = await self._send("POST", "/v1/load_lora_adapter", body, _BUSY_STATUS, self._prompt)
        if "LoRA is not enabled" in answer:
            return "it was started without `--enable-lora`"
        if status == 404 and "spin-trl-probe" not in answer:
            return "it was started without the environment variable `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`"
        return None

    async def reload_refusal(self) -> str | None:
        """Why the server cannot reload its weights at run time, or `None` if it can."""
        # Without a method to call, the endpoint answers 400 where it exists.
        status, _ = await self._send("POST", "/collective_rpc", {}, _BUSY_STATUS, self._prompt)
        if status == 404:
            return "it was started without the environment variable `VLLM_SERVER_DEV_MODE=1`"
        status, _ = await self._send("GET", "/weight_info", timeout=self._prompt)
        return "it keeps no version of its weights, as vLLM from 0.31 on does" if status == 404 else None

    # What the server plays

    async def load_adapter(self, name: str, path: str) -> None:
        """Load the adapter in the folder `path` on the server's disk. One that is loaded already is left as it is."""
        body = {"lora_name": name, "lora_path": path}
        for is_last in (False, True):
            status, text = await self._send("POST", "/v1/load_lora_adapter", body, retried=_BUSY_STATUS)
            # Another process was faster, or the connection broke after the server had loaded it.
            if status == 200 or any(model["id"] == name for model in await self.served_models()):
                return
            # What the engine thinks of an adapter, such as a rank that is too high, comes as 500 and does not change,
            # but so does that it has just died.
            if status < 500 or is_last:
                raise self._refusal("POST", "/v1/load_lora_adapter", status, text)
            await self.wait_until_ready()

    async def unload_adapter(self, name: str) -> None:
        """Free an adapter, if the server is there to do so: one that is gone has freed it."""
        with suppress(UnreachableError):
            await self._send("POST", "/v1/unload_lora_adapter", {"lora_name": name}, timeout=_SHORTLY, patience=0)

    async def reload_weights(self, path: str) -> None:
        """Replace the weights by those in the folder `path` on the server's disk, and forget cached prefixes."""
        body = {"method": "reload_weights", "args": [], "kwargs": {"weights_path": path}}
        await self._call("POST", "/collective_rpc", body, retried=_BUSY_STATUS)
        # Requests of before, which nobody waits for any more, would keep their share of the cache.
        reset = "/reset_prefix_cache?reset_running_requests=true"
        status, text = await self._send("POST", reset, retried=_BUSY_STATUS)
        if status != 200 or "false" in text:
            raise self._refusal("POST", reset, status, text)

    async def weight_version(self) -> str:
        """What was last said to be the version of the weights: "default" if nothing was since the server started."""
        expected = "a `weight_version`"
        answer = await self._look("/weight_info", lambda answer: isinstance(answer["weight_version"], str), expected)
        return answer["weight_version"]

    async def set_weight_version(self, version: str) -> None:
        """Say what the weights are from now on, in a single attempt: by the next the server may be another one."""
        await self._call("POST", "/update_weight_version", {"new_version": version}, patience=0)

    async def sleep(self, level: int) -> None:
        """Free the GPU's memory: level 1 keeps the weights in host memory, level 2 keeps nothing, nor their version."""
        if level == 2:
            await self.set_weight_version("discarded")
        await self._call("POST", f"/sleep?level={level}", patience=_SHORTLY)

    async def wake_up(self) -> None:
        """Take the GPU's memory again, with the weights if they were kept."""
        await self._call("POST", "/wake_up", patience=_SHORTLY)

    # Completions

    async def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """
        The first choice for a body of `/v1/completions`.

        Raises:
            [`UnknownModelError`]: if the server does not have the model.
        """
        give_up_at = time.monotonic() + self.patience
        while True:
            text = await self._call("POST", "/v1/completions", body, among_others=True)
            try:
                choice = json.loads(text)["choices"][0]
                is_given_up = choice.get("finish_reason") == "abort"
            except (ValueError, LookupError, TypeError, AttributeError):
                raise SamplerError(
                    f"The vLLM server at {self.base_url} answered POST /v1/completions with no completion where one "
                    f"was asked for: {_shortened(text)}. See its log, and what `generation_kwargs` asks of it."
                ) from None
            if not is_given_up:
                return choice
            if time.monotonic() >= give_up_at:
                raise self._unreachable("POST", "/v1/completions", "`finish_reason` 'abort': it gave the request up")
            await asyncio.sleep(self.delay)

    # HTTP

    @property
    def _prompt(self) -> float:
        return min(_PROMPT_ANSWER, self.server_timeout)

    async def _look(self, path: str, is_right: Callable[[Any], bool], expected: str) -> Any:
        """What a healthy server answers at once."""
        text = await self._call("GET", path, timeout=self._prompt)
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            if is_right(answer := json.loads(text)):
                return answer
        raise SamplerError(
            f"What answers at {self.base_url} is no vLLM server: GET {path} gave {_shortened(text)!r}, expected "
            f"{expected}. Correct `vllm_server_base_url`."
        )

    async def _call(self, method: str, path: str, body: dict | None = None, **options: Any) -> str:
        """As [`_send`], for what must be answered with 200. Returns the text."""
        status, text = await self._send(method, path, body, **options)
        if status != 200:
            raise self._refusal(method, path, status, text)
        return text

    async def _send(
        self,
        method: str,
        path: str,
        body: dict | None = None,
        retried: Collection[int] = _RETRIED_STATUS,
        timeout: float | None = None,
        among_others: bool = False,
        patience: float | None = None,
    ) -> tuple[int, str]:
        """
        Request until answered: what may pass is tried again, the rest is final. Returns status and text.

        Args:
            retried: Status codes that may pass.
            timeout: Seconds for one attempt, after which another is made. By default `request_timeout`, after which
                none is: an answer that took so long is not worth waiting for again.
            among_others: Whether it has so long after any of the requests sent so was answered.
            patience: Seconds after the first failure for which it is tried again. By default `patience`.
        """
        give_up_at, delay = None, self.delay
        while True:
            try:
                attempt = self._attempt(method, path, body)
                if among_others:
                    status, text = await self._wait_among_others(attempt)
                else:
                    # Not `wait_for`: in Python 3.11 it swallows a cancellation that comes with the answer.
                    async with asyncio.timeout(timeout or self.request_timeout):
                        status, text = await attempt
                if status not in retried:
                    return status, text
                problem = f"HTTP {status}: {_shortened(text)}"
            except TimeoutError:
                if timeout is None:
                    raise self._no_answer(method, path) from None
                problem = f"no answer within {timeout:g} s"
            except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError):
                raise SamplerError(
                    f"{self.base_url!r} is no address of a server. Set `vllm_server_base_url` to one such as "
                    "'http://localhost:8000'."
                ) from None
            except (aiohttp.ClientError, OSError) as error:
                problem = f"{type(error).__name__}: {error}"
            if self._socket is not None and (notice := death_notice(self._socket)).exists():
                raise SamplerError(notice.read_text())
            now = time.monotonic()
            if give_up_at is None:
                give_up_at = now + (self.patience if patience is None else patience)
            if now >= give_up_at:
                raise self._unreachable(method, path, problem)
            # Jitter keeps requests that failed together from coming back together.
            await asyncio.sleep(min(delay * _jitter.uniform(0.5, 1.0), give_up_at - now))
            delay = min(2 * delay, _LARGEST_DELAY * self.delay)

    async def _attempt(self, method: str, path: str, body: dict | None) -> tuple[int, str]:
        if self._session is None:
            # No limit of its own: a question about the server must not queue behind the completions.
            unix, tcp = aiohttp.UnixConnector, aiohttp.TCPConnector
            connector = tcp(limit=0) if self._socket is None else unix(str(self._socket), limit=0)
            no_limit = aiohttp.ClientTimeout(total=None)
            self._session = aiohttp.ClientSession(connector=connector, timeout=no_limit, headers=self._headers)
        url = (self.base_url if self._socket is None else "http://localhost") + path
        async with self._session.request(method, url, json=body) as response:
            return response.status, await response.text(errors="replace")

    async def _wait_among_others(self, attempt: Awaitable[tuple[int, str]]) -> tuple[int, str]:
        """Wait as long as other completions come back: one that is only queued behind them is not lost."""
        started_at = time.monotonic()
        task = asyncio.ensure_future(attempt)
        try:
            while not task.done():
                left = max(started_at, self._completed_at) + self.request_timeout - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                await asyncio.wait([task], timeout=left)
            self._completed_at = time.monotonic()
            return task.result()
        finally:
            task.cancel()

    # What went wrong, in words

    def _refusal(self, method: str, path: str, status: int, text: str) -> SamplerError:
        remedy = ""
        if status in (401, 403):
            remedy = ". It expects another API key: set the environment variable VLLM_API_KEY to it."
        elif method == "GET" and status == 404:
            remedy = ". Expected is a vLLM server, which knows that path: correct `vllm_server_base_url`."
        kind = UnknownModelError if (status, path) == (404, "/v1/completions") else SamplerError
        return kind(
            f"The vLLM server at {self.base_url} refused {method} {path}. HTTP {status}: {_shortened(text)}{remedy}"
        )

    def _no_answer(self, method: str, path: str) -> UnreachableError:
        return UnreachableError(
            f"The vLLM server at {self.base_url} gave no answer within `vllm_request_timeout` "
            f"({self.request_timeout:g} s) to {method} {path}. Raise it if single answers take that long; "
            "otherwise the server hangs: see its log and restart it."
        )

    def _unreachable(self, method: str, path: str, problem: str) -> UnreachableError:
        return UnreachableError(
            f"The vLLM server at {self.base_url} did not answer {method} {path}, however often it was asked. The last "
            f"problem: {problem}. Start it with `python -m spin_trl.serve MODEL`, correct `vllm_server_base_url`, or "
            "raise `vllm_server_timeout` if it needs longer to come back."
        )


def death_notice(socket: Path) -> Path:
    """File beside a managed server's socket that says why the server is gone, once nobody starts it again."""
    return socket.with_name("ended")


def _shortened(text: str) -> str:
    """The server's own words, at most a screenful."""
    return text.strip()[:1000] or "(empty answer)"
