"""The HTTP API of a stock vLLM server, as far as self-play needs it. The only file that knows it.

Checked against vLLM 0.31. Knows nothing of iterations, datasets or the trainer.
"""

import asyncio
import json
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from ..sampler import SamplerError
from .attempts import Attempts, Progress
from .errors import (
    no_address,
    no_answer,
    no_completion,
    no_progress,
    no_vllm,
    refusal,
    server_message,
    unreachable,
)


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

    With `patience` set, a failed request is tried again for so many seconds only, instead of `server_timeout`: where
    another server may be asked instead.

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
            raise no_address(base_url, "it must begin with 'http://' or 'https://'")
        self.base_url = normalized(base_url)
        self.server_timeout = server_timeout
        self.request_timeout = request_timeout
        self.progress_timeout = server_timeout + request_timeout if progress_timeout is None else progress_timeout
        self.max_concurrent_requests = max_concurrent_requests
        self.death_notice = death_notice
        self.patience: float | None = None
        self.num_broken_connections = 0
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._loop = asyncio.new_event_loop()
        self._running: asyncio.Task | None = None
        self._is_interrupted = False
        self._session: aiohttp.ClientSession | None = None

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._loop.run_until_complete(_cancel(asyncio.all_tasks(self._loop)))
        if self._session is not None:
            self._loop.run_until_complete(self._session.close())
        self._loop.close()

    # One thread at a time uses a client. From another one it can be told to stop.

    def interrupt(self) -> None:
        """Have what is going on in another thread, and all that follows there, end with `asyncio.CancelledError`."""
        self._is_interrupted = True
        self._loop.call_soon_threadsafe(self._cancel_running)

    def allow(self) -> None:
        """Forget that it was interrupted."""
        self._is_interrupted = False

    def _cancel_running(self) -> None:
        if self._is_interrupted and self._running is not None:
            self._running.cancel()

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
        raise no_vllm(self.base_url, "GET", "/v1/models", str(answer), "a list of models with their `id`")

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
                raise refusal(self.base_url, "POST", "/v1/load_lora_adapter", status, text)
            self.wait_until_ready()

    def unload_adapter(self, name: str) -> None:
        """Free an adapter. One that is not loaded, because the server was restarted, is free already."""
        body = {"lora_name": name}
        status, text = self._run(self._send("POST", "/v1/unload_lora_adapter", body))
        if status not in (200, 404):
            raise refusal(self.base_url, "POST", "/v1/unload_lora_adapter", status, text)

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
            raise refusal(self.base_url, "POST", path, status, text)

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
                batch = self._run(_next_batch(results, progress))
                if not batch:
                    raise no_progress(self.base_url, progress, in_flight.values())
                for result in batch:
                    if isinstance(result, Exception):
                        raise result
                    if result is None:
                        num_working -= 1
                    else:
                        yield result
                        progress.made()
        finally:
            if not self._loop.is_closed():
                self._loop.run_until_complete(_cancel(workers))

    async def _complete(self, body: dict[str, Any], attempts: Attempts) -> dict[str, Any]:
        path = "/v1/completions"
        while True:
            answer = await self._json("POST", path, body, attempts=attempts)
            try:
                choice = answer["choices"][0]
                finish_reason = choice.get("finish_reason")
            except (KeyError, IndexError, TypeError, AttributeError):
                raise no_completion(self.base_url, path, answer) from None
            if finish_reason != "abort":
                return choice
            await self._pause(attempts, "POST", path, "`finish_reason` 'abort': the server gave the request up")

    # HTTP

    @property
    def _patience(self) -> float:
        """Seconds for which a failed request is tried again."""
        if self.patience is not None:
            return self.patience
        # Where somebody restarts the server, and says so if it fails, that comes first.
        return self.server_timeout * (1 if self.death_notice is None else 2)

    def _run(self, coroutine):
        if self._is_interrupted:
            coroutine.close()
            raise asyncio.CancelledError
        self._running = self._loop.create_task(coroutine)
        try:
            return self._loop.run_until_complete(self._running)
        finally:
            self._running = None

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
            raise refusal(self.base_url, method, path, status, text)
        try:
            return json.loads(text) if read else None
        except json.JSONDecodeError:
            raise no_vllm(self.base_url, method, path, text) from None

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
                problem = f"HTTP {status}: {server_message(text)}"
            except TimeoutError:
                if timeout is None:
                    raise no_answer(self.base_url, method, path, self.request_timeout) from None
                problem = f"no answer within {timeout:g} s"
            except aiohttp.InvalidURL as error:
                raise no_address(self.base_url, str(error)) from None
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
            raise unreachable(self.base_url, method, path, self.server_timeout, attempts)
        until = time.monotonic() + delay
        while (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left, _LONGEST_SLEEP))
            self._check_alive()

    def _check_alive(self) -> None:
        if self.death_notice is not None and self.death_notice.exists():
            raise SamplerError(self.death_notice.read_text())


async def _next_batch(results: asyncio.Queue, progress: Progress) -> list[Any]:
    """All results that are there; if there are none, the first to come, or nothing if none comes in time."""
    batch = _drain(results)  # what came while nobody looked came in time
    if not batch:
        try:
            batch = [await asyncio.wait_for(results.get(), progress.left())]
        except TimeoutError:
            return []
    return batch + _drain(results)


def _drain(results: asyncio.Queue) -> list[Any]:
    return [results.get_nowait() for _ in range(results.qsize())]


async def _cancel(tasks: Collection[asyncio.Task]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


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


def normalized(base_url: str) -> str:
    """An address as requests begin with it: two that are equal are one server."""
    return base_url.rstrip("/").removesuffix("/v1")
