"""The HTTP API of a stock vLLM server, as far as self-play needs it. The only file that knows it.

Checked against vLLM 0.31. Knows nothing of iterations, datasets or the trainer.
"""

import asyncio
import json
import time
from collections.abc import Collection, Iterable, Iterator
from typing import Any, TypeVar

import aiohttp

from .sampler import SamplerError


T = TypeVar("T")

# 4xx is the server's final word, except for these two; 5xx and a broken connection may pass.
_RETRIED_STATUS = (408, 429, *range(500, 600))
_BUSY_STATUS = (408, 429, 503)
_FIRST_RETRY_DELAY = 0.5  # seconds, doubled up to the next
_LONGEST_RETRY_DELAY = 10.0


class VLLMServer:
    """
    Client of one vLLM server.

    Args:
        base_url (`str`): Address, such as `"http://localhost:8000"`.
        api_key (`str`, *optional*): Sent as a bearer token.
        server_timeout (`float`): Seconds within which a server that is down must be back.
        request_timeout (`float`): Seconds within which a request must be answered.

    Every method raises [`SamplerError`] with the server's own message, or with what was tried.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        server_timeout: float = 240.0,
        request_timeout: float = 600.0,
        max_concurrent_requests: int = 256,
    ):
        if not base_url.startswith(("http://", "https://")):
            raise SamplerError(
                f"{base_url!r} is no address of a server: it must begin with 'http://' or 'https://'. Set "
                "`vllm_server_base_url` to one such as 'http://localhost:8000'."
            )
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.server_timeout = server_timeout
        self.request_timeout = request_timeout
        self.max_concurrent_requests = max_concurrent_requests
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._loop = asyncio.new_event_loop()
        self._session: aiohttp.ClientSession | None = None

    def close(self) -> None:
        if self._loop.is_closed():
            return
        if self._session is not None:
            self._loop.run_until_complete(self._session.close())
        self._loop.close()

    # What the server is

    def wait_until_ready(self) -> None:
        """Return as soon as the server is healthy; give up after `server_timeout` seconds."""
        self._call("GET", "/health", read=False)

    def served_models(self) -> list[dict[str, Any]]:
        """The models served: `id`, and for a base model also `root` (where it came from) and `max_model_len`."""
        answer = self._call("GET", "/v1/models")
        try:
            if all(isinstance(model["id"], str) for model in answer["data"]):
                return answer["data"]
        except (KeyError, TypeError):
            pass
        raise SamplerError(
            f"What answers at {self.base_url} is no vLLM server: GET /v1/models gave {_server_message(str(answer))!r}, "
            "expected a list of models with their `id`. Correct `vllm_server_base_url`."
        )

    def adapter_refusal(self) -> str | None:
        """Why the server cannot load LoRA adapters at run time, or `None` if it can."""
        # An adapter that does not exist tells a server that would load it from one that would not.
        body = {"lora_name": "spin-trl-probe", "lora_path": "/nonexistent/spin-trl-probe"}
        status, answer = self._run(self._send("POST", "/v1/load_lora_adapter", body, retried=()))
        if "LoRA is not enabled" in answer:
            return "it was started without `--enable-lora`"
        if status == 404 and "spin-trl-probe" not in answer:
            return "it was started without the environment variable `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`"
        return None

    def reload_refusal(self) -> str | None:
        """Why the server cannot reload its weights at run time, or `None` if it can."""
        # Without a method to call, the endpoint answers 400 where it exists.
        status, _ = self._run(self._send("POST", "/collective_rpc", {}, retried=()))
        return "it was started without the environment variable `VLLM_SERVER_DEV_MODE=1`" if status == 404 else None

    # What the server plays

    def load_adapter(self, name: str, path: str) -> None:
        # What the engine thinks of an adapter, such as a rank that is too high, comes as 500, and will not change.
        body = {"lora_name": name, "lora_path": path}
        self._call("POST", "/v1/load_lora_adapter", body, read=False, retried=_BUSY_STATUS)

    def unload_adapter(self, name: str) -> None:
        self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name}, read=False)

    def reload_weights(self, path: str) -> None:
        """Replace the weights by those in the folder `path` on the server's disk, and forget cached prefixes."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": path}}
        self._call("POST", "/collective_rpc", body, read=False, retried=_BUSY_STATUS)
        self._call("POST", "/reset_prefix_cache", read=False)

    # Completions

    def complete(self, bodies: Iterable[tuple[T, dict[str, Any]]]) -> Iterator[tuple[T, dict[str, Any]]]:
        """
        Post each body to `/v1/completions`, many at once, and yield (key, first choice) as they come back.

        Args:
            bodies (iterable of `(key, body)`): Read lazily, one for each free slot.
        """
        results: asyncio.Queue = asyncio.Queue()
        source = iter(bodies)

        async def work() -> None:
            try:
                for key, body in source:
                    answer = await self._json("POST", "/v1/completions", body)
                    results.put_nowait((key, answer["choices"][0]))
            except Exception as error:  # handed to the consumer, who raises it
                results.put_nowait(error)
            else:
                results.put_nowait(None)

        workers = [self._loop.create_task(work()) for _ in range(self.max_concurrent_requests)]
        num_working = len(workers)
        try:
            while num_working:
                result = self._run(results.get())
                if isinstance(result, Exception):
                    raise result
                if result is None:
                    num_working -= 1
                else:
                    yield result
        finally:
            for worker in workers:
                worker.cancel()
            self._run(_settle(workers))

    # HTTP

    def _run(self, coroutine):
        return self._loop.run_until_complete(coroutine)

    def _call(self, method: str, path: str, body: dict | None = None, **options: Any) -> Any:
        return self._run(self._json(method, path, body, **options))

    async def _json(
        self,
        method: str,
        path: str,
        body: dict | None = None,
        read: bool = True,
        retried: Collection[int] = _RETRIED_STATUS,
    ) -> Any:
        status, text = await self._send(method, path, body, retried)
        if status != 200:
            raise SamplerError(
                f"The vLLM server at {self.base_url} refused {method} {path}. HTTP {status}: {_server_message(text)}"
                f"{_remedy(method, status)}"
            )
        try:
            return json.loads(text) if read else None
        except json.JSONDecodeError as error:
            raise SamplerError(
                f"What answers at {self.base_url} is no vLLM server: {method} {path} gave {_server_message(text)!r} "
                "instead of JSON. Correct `vllm_server_base_url`."
            ) from error

    async def _send(
        self, method: str, path: str, body: dict | None, retried: Collection[int] = _RETRIED_STATUS
    ) -> tuple[int, str]:
        """Request until answered: what may pass is tried again for `server_timeout` seconds, the rest is final."""
        first_failure: float | None = None
        delay = _FIRST_RETRY_DELAY
        while True:
            try:
                session = await self._open_session()
                async with session.request(method, self.base_url + path, json=body, headers=self._headers) as response:
                    text = await response.text()
                    if response.status not in retried:
                        return response.status, text
                    problem = f"HTTP {response.status}: {_server_message(text)}"
            except TimeoutError:
                raise SamplerError(
                    f"The vLLM server at {self.base_url} gave no answer within `vllm_request_timeout` "
                    f"({self.request_timeout:g} s) to {method} {path}. Raise it if single answers take that long; "
                    "otherwise the server hangs: see its log and restart it."
                ) from None
            except aiohttp.ClientError as error:
                problem = f"{type(error).__name__}: {error}"
            first_failure = first_failure or time.monotonic()
            if time.monotonic() + delay > first_failure + self.server_timeout:
                raise SamplerError(
                    f"The vLLM server at {self.base_url} did not answer {method} {path} within `vllm_server_timeout` "
                    f"({self.server_timeout:g} s). Last problem: {problem}. Start it with `python -m spin_trl.serve "
                    "MODEL`, or correct `vllm_server_base_url`."
                )
            await asyncio.sleep(delay)
            delay = min(2 * delay, _LONGEST_RETRY_DELAY)

    async def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self.max_concurrent_requests),
                timeout=aiohttp.ClientTimeout(total=self.request_timeout),
            )
        return self._session


async def _settle(tasks: list[asyncio.Task]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


def _remedy(method: str, status: int) -> str:
    if status in (401, 403):
        return ". It expects another API key: set `vllm_api_key` or VLLM_API_KEY to the one it was started with."
    if method == "GET" and status == 404:
        return ". Expected is a vLLM server, which knows that path: correct `vllm_server_base_url`."
    return ""


def _server_message(text: str) -> str:
    """The server's own words, at most a screenful."""
    return text.strip()[:1000] or "(empty answer)"
