"""The HTTP API of a stock vLLM server, as far as self-play needs it. The only file that knows it.

Checked against vLLM 0.31. Knows nothing of iterations, datasets or the trainer.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from .attempts import Attempts, Progress
from .sampler import SamplerError


T = TypeVar("T")

# 4xx is the server's final word, except for these two; 5xx and a broken connection may pass.
_RETRIED_STATUS = (408, 429, *range(500, 600))
_BUSY_STATUS = (408, 429, 503)
# Seconds for an answer that takes a healthy server none to speak of. Later is as bad as never, and tried again.
_PROMPT_ANSWER = 30.0
_FAREWELL = 5.0  # seconds for what is nice to have at the end
# Seconds for which falling asleep and waking up are tried again: more than a connection that went stale needs. While a
# server rests nobody restarts it.
_BUDGET_OF_SLEEP = 5.0
_LONGEST_SLEEP = 1.0  # seconds between two looks at whether the server is gone for good

_MARK = "spin_trl:"


class UnknownModelError(SamplerError):
    """The server does not have the model that was to answer."""


class VLLMServer:
    """
    Client of one vLLM server.

    Args:
        base_url (`str`): Address, such as `"http://localhost:8000"`.
        api_key (`str`, *optional*): Sent as a bearer token.
        server_timeout (`float`): Seconds within which a server that is down must be back.
        request_timeout (`float`): Seconds within which a request must be answered.
        progress_timeout (`float`, *optional*): Seconds within which any of many completions must come back. By default
            `server_timeout` and `request_timeout` together: a restart, and the first answer after it.
        max_concurrent_requests (`int`): Number of completions in flight.
        death_notice (`Path`, *optional*): File that appears, and says why, when the server is gone for good.

    Every method raises [`SamplerError`] with the server's own message, or with what was tried. None waits without
    bound: each attempt, and the time for which attempts are repeated, has its own.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        server_timeout: float = 240.0,
        request_timeout: float = 600.0,
        progress_timeout: float | None = None,
        max_concurrent_requests: int = 256,
        death_notice: Path | None = None,
    ):
        if not base_url.startswith(("http://", "https://")):
            raise SamplerError(
                f"{base_url!r} is no address of a server: it must begin with 'http://' or 'https://'. Set "
                "`vllm_server_base_url` to one such as 'http://localhost:8000'."
            )
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.server_timeout = server_timeout
        self.request_timeout = request_timeout
        self.progress_timeout = server_timeout + request_timeout if progress_timeout is None else progress_timeout
        self.max_concurrent_requests = max_concurrent_requests
        self.death_notice = death_notice
        self.num_broken_connections = 0
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._loop = asyncio.new_event_loop()
        self._session: aiohttp.ClientSession | None = None

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._run(_cancel(asyncio.all_tasks(self._loop)))
        if self._session is not None:
            self._run(self._session.close())
        self._loop.close()

    # What the server is

    def wait_until_ready(self) -> None:
        """Return as soon as the server is healthy; give up after `server_timeout` seconds."""
        self._ask("GET", "/health", read=False)

    def served_models(self) -> list[dict[str, Any]]:
        """The models served: `id`, and for a base model also `root` (where it came from) and `max_model_len`."""
        answer = self._ask("GET", "/v1/models")
        try:
            if all(isinstance(model["id"], str) for model in answer["data"]):
                return answer["data"]
        except (KeyError, TypeError):
            pass
        raise self._no_vllm("GET", "/v1/models", str(answer), "a list of models with their `id`")

    def adapter_refusal(self) -> str | None:
        """Why the server cannot load LoRA adapters at run time, or `None` if it can."""
        # An adapter that does not exist tells a server that would load it from one that would not.
        body = {"lora_name": "spin-trl-probe", "lora_path": "/nonexistent/spin-trl-probe"}
        status, answer = self._probe("/v1/load_lora_adapter", body)
        if "LoRA is not enabled" in answer:
            return "it was started without `--enable-lora`"
        if status == 404 and "spin-trl-probe" not in answer:
            return "it was started without the environment variable `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`"
        return None

    def reload_refusal(self) -> str | None:
        """Why the server cannot reload its weights at run time, or `None` if it can."""
        # Without a method to call, the endpoint answers 400 where it exists.
        status, _ = self._probe("/collective_rpc", {})
        return "it was started without the environment variable `VLLM_SERVER_DEV_MODE=1`" if status == 404 else None

    # What the server plays

    def load_adapter(self, name: str, path: str) -> None:
        """Load the adapter in the folder `path` on the server's disk. One that is loaded already is left as it is."""
        body = {"lora_name": name, "lora_path": path}
        for is_last in (False, True):
            status, text = self._run(self._send("POST", "/v1/load_lora_adapter", body, retried=_BUSY_STATUS))
            # Another process was faster, or the connection broke after the server had loaded it.
            if status == 200 or any(model["id"] == name for model in self.served_models()):
                return
            # What the engine thinks of an adapter, such as a rank that is too high, comes as 500 and does not change,
            # but so does that it has just died.
            if status < 500 or is_last:
                raise self._refusal("POST", "/v1/load_lora_adapter", status, text)
            self.wait_until_ready()

    def unload_adapter(self, name: str) -> None:
        """Free an adapter. One that is not loaded, because the server was restarted, is free already."""
        body = {"lora_name": name}
        status, text = self._run(self._send("POST", "/v1/unload_lora_adapter", body))
        if status not in (200, 404):
            raise self._refusal("POST", "/v1/unload_lora_adapter", status, text)

    def try_to_unload_adapter(self, name: str) -> None:
        """Free an adapter if the server is there to do so; a single attempt, and no error."""
        attempts = Attempts(budget=0)
        try:
            body = {"lora_name": name}
            self._run(self._send("POST", "/v1/unload_lora_adapter", body, timeout=_FAREWELL, attempts=attempts))
        except SamplerError:  # gone with everything that was loaded, or not ours to mend
            pass

    def reload_weights(self, path: str) -> None:
        """Replace the weights by those in the folder `path` on the server's disk, and forget cached prefixes."""
        self._call_workers("reload_weights", kwargs={"weights_path": path})
        # Requests of before, which nobody waits for any more, would keep their share of the cache.
        path = "/reset_prefix_cache?reset_running_requests=true"
        status, text = self._run(self._send("POST", path, None, retried=_BUSY_STATUS))
        if status != 200 or "false" in text:
            raise self._refusal("POST", path, status, text)

    def sleep(self, level: int) -> None:
        """Free the GPU's memory: level 1 keeps the weights in host memory, level 2 keeps nothing."""
        self._call("POST", f"/sleep?level={level}", read=False, attempts=Attempts(_BUDGET_OF_SLEEP))

    def wake_up(self) -> None:
        """Take the GPU's memory again, with the weights if they were kept."""
        self._call("POST", "/wake_up", read=False, attempts=Attempts(_BUDGET_OF_SLEEP))

    # Marks: what distinguishes a server from the same one restarted, which has lost what was loaded into it. They are
    # attributes of the objects that hold the weights, so they are there exactly as long as those.

    def can_be_marked(self) -> bool:
        """Whether the server lets its workers be marked. A stock one does wherever it can reload weights."""
        status, text = self._probe("/collective_rpc", {"method": "__dir__"})
        return status == 200 and _worker_marks(text) is not None

    def marks(self) -> frozenset[str]:
        """Marks that every worker carries."""
        marks = _worker_marks(json.dumps(self._call("POST", "/collective_rpc", {"method": "__dir__"})))
        if marks is None:
            raise SamplerError(f"The vLLM server at {self.base_url} no longer tells its workers' marks. Restart it.")
        return marks

    def add_mark(self, mark: str) -> None:
        """Mark all workers."""
        self._call_workers("__setattr__", args=[_MARK + mark, ""])

    def try_to_add_mark(self, mark: str) -> bool:
        """Mark all workers, in a single attempt: by the next the server may be another one. Whether it succeeded."""
        try:
            self._call_workers("__setattr__", args=[_MARK + mark, ""], attempts=Attempts(budget=0))
        except SamplerError:
            return False
        return True

    def remove_mark(self, mark: str) -> None:
        # 500 where it is gone already: another process was faster, or the server was restarted.
        body = {"method": "__delattr__", "args": [_MARK + mark]}
        self._run(self._send("POST", "/collective_rpc", body, retried=_BUSY_STATUS))

    # Completions

    def complete(
        self, bodies: Iterable[tuple[T, dict[str, Any]]], progress: Progress | None = None
    ) -> Iterator[tuple[T, dict[str, Any]]]:
        """
        Post each body to `/v1/completions`, many at once, and yield (key, first choice) as they come back.

        Args:
            bodies (iterable of `(key, body)`): Read lazily, one for each free slot.
            progress ([`Progress`], *optional*): Of the phase that this is a part of. By default it is all of one.

        Raises:
            `UnknownModelError`: if the server does not have the model.
        """
        progress = progress or Progress(self.progress_timeout)
        results: asyncio.Queue = asyncio.Queue()
        source = iter(bodies)
        in_flight: dict[int, Attempts] = {}

        async def work(slot: int) -> None:
            try:
                for key, body in source:
                    in_flight[slot] = Attempts(self._patience)
                    choice = await self._complete(body, in_flight[slot])
                    del in_flight[slot]
                    results.put_nowait((key, choice))
            except Exception as error:  # handed to the consumer, who raises it
                results.put_nowait(error)
            else:
                results.put_nowait(None)

        workers = [self._loop.create_task(work(slot)) for slot in range(self.max_concurrent_requests)]
        num_working = len(workers)
        try:
            while num_working:
                result = self._run(_first(results, progress))
                if result is _NOTHING:
                    raise self._no_progress(progress, in_flight.values())
                if isinstance(result, Exception):
                    raise result
                if result is None:
                    num_working -= 1
                else:
                    yield result
                    progress.made()
        finally:
            if not self._loop.is_closed():
                self._run(_cancel(workers))

    async def _complete(self, body: dict[str, Any], attempts: Attempts) -> dict[str, Any]:
        path = "/v1/completions"
        while True:
            answer = await self._json("POST", path, body, attempts=attempts)
            try:
                choice = answer["choices"][0]
                finish_reason = choice.get("finish_reason")
            except (KeyError, IndexError, TypeError, AttributeError):
                raise SamplerError(
                    f"The vLLM server at {self.base_url} answered POST {path} with no completion where one was asked "
                    f"for: {_server_message(json.dumps(answer))}. See its log, and what `generation_kwargs` asks of it."
                ) from None
            if finish_reason != "abort":
                return choice
            await self._pause(attempts, "POST", path, "`finish_reason` 'abort': the server gave the request up")

    # HTTP

    @property
    def _patience(self) -> float:
        """Seconds for which a failed request is tried again."""
        # Where somebody restarts the server, and says so if it fails, that comes first.
        return self.server_timeout * (1 if self.death_notice is None else 2)

    def _run(self, coroutine):
        return self._loop.run_until_complete(coroutine)

    def _call(self, method: str, path: str, body: dict | None = None, **options: Any) -> Any:
        return self._run(self._json(method, path, body, **options))

    def _ask(self, method: str, path: str, **options: Any) -> Any:
        """What a healthy server answers at once."""
        return self._call(method, path, timeout=min(_PROMPT_ANSWER, self.server_timeout), **options)

    def _probe(self, path: str, body: dict) -> tuple[int, str]:
        """Status and text of an answer that may well be an error."""
        timeout = min(_PROMPT_ANSWER, self.server_timeout)
        return self._run(self._send("POST", path, body, retried=(), timeout=timeout))

    def _call_workers(
        self, method: str, args: list[str] | None = None, kwargs: dict[str, str] | None = None, **options: Any
    ) -> None:
        body = {"method": method, "args": args or [], "kwargs": kwargs or {}}
        self._call("POST", "/collective_rpc", body, read=False, retried=_BUSY_STATUS, **options)

    async def _json(self, method: str, path: str, body: dict | None = None, read: bool = True, **options: Any) -> Any:
        status, text = await self._send(method, path, body, **options)
        if status != 200:
            raise self._refusal(method, path, status, text)
        try:
            return json.loads(text) if read else None
        except json.JSONDecodeError:
            raise self._no_vllm(method, path, text) from None

    async def _send(
        self,
        method: str,
        path: str,
        body: dict | None,
        retried: Collection[int] = _RETRIED_STATUS,
        timeout: float | None = None,
        attempts: Attempts | None = None,
    ) -> tuple[int, str]:
        """
        Request until answered: what may pass is tried again, the rest is final.

        Args:
            retried: Status codes that may pass.
            timeout: Seconds for one attempt, after which another is made. By default `request_timeout`, after which
                none is: an answer that took so long is not worth waiting for again.
            attempts: Those at the request so far. By default none.
        """
        attempts = attempts or Attempts(self._patience)
        while True:
            attempts.waiting_for = "an answer"
            asked_delay = None
            try:
                status, text, asked_delay = await self._attempt(method, path, body, timeout or self.request_timeout)
                if status not in retried:
                    return status, text
                problem = f"HTTP {status}: {_server_message(text)}"
            except TimeoutError:
                if timeout is None:
                    raise self._no_answer(method, path) from None
                problem = f"no answer within {timeout:g} s"
            except aiohttp.InvalidURL as error:
                raise SamplerError(
                    f"{self.base_url!r} is no address of a server ({error}). Set `vllm_server_base_url` to one such as "
                    "'http://localhost:8000'."
                ) from None
            except (aiohttp.ClientError, OSError) as error:
                self.num_broken_connections += 1
                problem = f"{type(error).__name__}: {error}"
            await self._pause(attempts, method, path, problem, asked_delay)

    async def _attempt(self, method: str, path: str, body: dict | None, timeout: float) -> tuple[int, str, str | None]:
        if self._session is None:
            # No limit of its own: a question about the server must not queue behind the completions.
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        request = self._session.request(
            method,
            self.base_url + path,
            json=body,
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=timeout),
        )
        async with request as response:
            return response.status, await response.text(errors="replace"), response.headers.get("Retry-After")

    async def _pause(
        self, attempts: Attempts, method: str, path: str, problem: str, asked_delay: str | None = None
    ) -> None:
        """Wait until the next attempt, if there is to be one."""
        self._check_alive()
        delay = attempts.next_delay(problem, asked_delay)
        if delay is None:
            raise SamplerError(
                f"The vLLM server at {self.base_url} did not answer {method} {path} within `vllm_server_timeout` "
                f"({self.server_timeout:g} s): {attempts.num_failed} attempts, the last {attempts.elapsed:.1f} s after "
                f"the first. Last problem: {problem}. Start it with `python -m spin_trl.serve MODEL`, or correct "
                "`vllm_server_base_url`."
            )
        until = time.monotonic() + delay
        while (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left, _LONGEST_SLEEP))
            self._check_alive()

    def _check_alive(self) -> None:
        if self.death_notice is not None and self.death_notice.exists():
            raise SamplerError(self.death_notice.read_text())

    # Errors

    def _refusal(self, method: str, path: str, status: int, text: str) -> SamplerError:
        kind = UnknownModelError if (status, path) == (404, "/v1/completions") else SamplerError
        return kind(
            f"The vLLM server at {self.base_url} refused {method} {path}. HTTP {status}: {_server_message(text)}"
            f"{_remedy(method, status)}"
        )

    def _no_vllm(self, method: str, path: str, text: str, expected: str = "JSON") -> SamplerError:
        return SamplerError(
            f"What answers at {self.base_url} is no vLLM server: {method} {path} gave {_server_message(text)!r}, "
            f"expected {expected}. Correct `vllm_server_base_url`."
        )

    def _no_answer(self, method: str, path: str) -> SamplerError:
        return SamplerError(
            f"The vLLM server at {self.base_url} gave no answer within `vllm_request_timeout` "
            f"({self.request_timeout:g} s) to {method} {path}. Raise it if single answers take that long; otherwise "
            "the server hangs: see its log and restart it."
        )

    def _no_progress(self, progress: Progress, in_flight: Collection[Attempts]) -> SamplerError:
        waiting = Counter(attempts.waiting_for for attempts in in_flight)
        shown = "; ".join(f"{count} for {what}" for what, count in waiting.most_common(3))
        return SamplerError(
            f"Not one completion came back from the vLLM server at {self.base_url} within `vllm_progress_timeout` "
            f"({progress.timeout:g} s). {len(in_flight)} requests are waiting: {shown}. See the server's log and "
            "restart it; if it is only slow, raise `vllm_progress_timeout` or lower `vllm_max_concurrent_requests`."
        )


_NOTHING = object()


async def _first(results: asyncio.Queue, progress: Progress) -> Any:
    """The first result to come, or `_NOTHING` if none comes in time."""
    try:
        return results.get_nowait()  # what came while nobody looked came in time
    except asyncio.QueueEmpty:
        pass
    try:
        return await asyncio.wait_for(results.get(), progress.left())
    except TimeoutError:
        return _NOTHING


async def _cancel(tasks: Collection[asyncio.Task]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _remedy(method: str, status: int) -> str:
    if status in (401, 403):
        return ". It expects another API key: set `vllm_api_key` or VLLM_API_KEY to the one it was started with."
    if method == "GET" and status == 404:
        return ". Expected is a vLLM server, which knows that path: correct `vllm_server_base_url`."
    return ""


def _worker_marks(text: str) -> frozenset[str] | None:
    """Marks that every worker carries, by what each says of its attributes; `None` if that is not what it says."""
    try:
        workers = json.loads(text)["results"]
    except (ValueError, TypeError, KeyError):
        return None
    if not isinstance(workers, list) or not workers or not all(_is_list_of_names(names) for names in workers):
        return None
    common = set.intersection(*map(set, workers))
    return frozenset(name.removeprefix(_MARK) for name in common if name.startswith(_MARK))


def _is_list_of_names(names: Any) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def _server_message(text: str) -> str:
    """The server's own words, at most a screenful."""
    return text.strip()[:1000] or "(empty answer)"
