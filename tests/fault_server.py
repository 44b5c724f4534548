"""A small HTTP server that fails on purpose, and what stands in for a vLLM server behind it."""

import json
import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from spin_trl.generation.sampler import Completion, CompletionRequest, OpponentSampler, SamplingParams


PATIENCE = 30.0  # seconds until a server that waits for something gives up; none waits for it when all is well
BASE, OPPONENT, END = 10, 11, 2  # token ids: the first two tell who played
PARAMS = SamplingParams(16, (END,))
HANG_UP = None  # an answer: close the connection without one

# Status, content and headers, the latter two where there are any.
Answer = tuple[int, dict | str] | tuple[int, dict | str, dict[str, str]] | None


class CutOff(tuple):
    """An answer whose connection breaks in the middle of the content."""


class _QuietServer(ThreadingHTTPServer):
    """Says nothing of clients that hang up, as those that are cancelled do."""

    request_queue_size = 256

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _QuietUnixServer(_QuietServer):
    address_family = socket.AF_UNIX
    server_bind = socketserver.TCPServer.server_bind  # not HTTPServer's, which asks for a host's name


class FaultyServer:
    """
    An HTTP server on a free loopback port, or on a Unix socket, that answers as `answer(path, body)` says, and
    remembers what it was asked.

    `answer` runs in a thread of its own for each connection, so it may block.
    """

    def __init__(self, path: str | None = None, answer: Callable[[str, dict | None], Answer] | None = None):
        self.answer = answer or (lambda path, body: (200, ""))
        self.requests: list[tuple[str, dict | None]] = []
        self.api_keys: set[str | None] = set()
        self.release = threading.Event()  # set at the end, for answers that hang
        if path is None:
            self._http = _QuietServer(("127.0.0.1", 0), self._handler())
            self.url = f"http://127.0.0.1:{self._http.server_port}"
        else:
            self._http = _QuietUnixServer(path, self._handler())
            self.url = f"unix:{path}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]

    def bodies(self, path: str) -> list[dict]:
        return [body for asked, body in self.requests if asked == path]

    def hang(self, path: str, body: dict | None) -> Answer:
        """An answer that does not come."""
        self.release.wait(PATIENCE)
        return 200, ""

    def close(self) -> None:
        self.release.set()
        self._http.shutdown()
        self._http.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # headers and content in one packet: a second one would wait for the first to be confirmed

            def do_GET(self):
                self.reply(None)

            def do_POST(self):
                content = self.rfile.read(int(self.headers["Content-Length"] or 0))
                self.reply(json.loads(content) if content else None)

            def reply(self, body):
                server.requests.append((self.path, body))
                server.api_keys.add(self.headers["Authorization"])
                answer = server.answer(self.path, body)
                self.close_connection = answer is HANG_UP or isinstance(answer, CutOff)
                if answer is HANG_UP:
                    return
                status, content, *headers = answer
                content = content if isinstance(content, bytes | str) else json.dumps(content)
                content = content.encode() if isinstance(content, str) else content
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                for name, value in (headers[0] if headers else {}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if isinstance(answer, CutOff) else content)

            def log_message(self, *args):
                pass

        return Handler


def completion(body: dict, played_by: int = BASE) -> Answer:
    """An answer that tells the prompt it is for, and by whom it is."""
    logprobs = {"token_logprobs": [-0.5, -1.5, -2.5]}
    return 200, {
        "choices": [{"token_ids": [body["prompt"][0], played_by, END], "finish_reason": "stop", "logprobs": logprobs}]
    }


class FakeVLLM:
    """Answers as vLLM 0.31 does, as far as a sampler asks before and while it plays; nothing while it is dead."""

    def __init__(self, name: str = "org/base-model", context_length: int = 64, adapters: bool = True):
        self.name = name
        self.context_length = context_length
        self.adapters = adapters
        self.is_dead = False
        self.num_reloads = 0
        self.lock = threading.RLock()
        self.restart()

    def restart(self) -> None:
        """Forget everything that was loaded."""
        with self.lock:
            self.loaded: list[str] = []
            self.weights = self.name
            self.version = "default"

    def __call__(self, path: str, body: dict | None) -> Answer:
        with self.lock:
            return HANG_UP if self.is_dead else self.answer(path, body)

    def answer(self, path: str, body: dict | None) -> Answer:
        base = {"id": self.name, "root": self.name, "parent": None, "max_model_len": self.context_length}
        if path == "/v1/models":
            return 200, {"data": [base, *({"id": name, "parent": self.name} for name in self.loaded)]}
        if path == "/v1/load_lora_adapter":
            return self.load(body)
        if path == "/v1/unload_lora_adapter":
            if body["lora_name"] not in self.loaded:
                return 404, {"error": {"message": f"The lora adapter '{body['lora_name']}' cannot be found."}}
            self.loaded.remove(body["lora_name"])
        if path == "/weight_info":
            return 200, {"weight_version": self.version}
        if path == "/update_weight_version":
            self.version = body["new_version"]
        if path == "/collective_rpc":
            return self.call_workers(body)
        if path == "/v1/completions":
            if body["model"] not in (self.name, *self.loaded):
                return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
            is_base = self.weights == body["model"] == self.name
            return completion(body, BASE if is_base else OPPONENT)
        return 200, ""

    def load(self, body: dict) -> Answer:
        if not self.adapters:
            return 500, {"error": {"message": "Call to add_lora method failed: LoRA is not enabled."}}
        if not Path(body["lora_path"]).is_dir():
            return 404, {"error": {"message": f"The lora adapter '{body['lora_name']}' cannot be found"}}
        if body["lora_name"] in self.loaded:
            return 400, {"error": {"message": f"The lora adapter '{body['lora_name']}' has already been loaded."}}
        self.loaded.append(body["lora_name"])
        return 200, ""

    def call_workers(self, body: dict) -> Answer:
        """As `collective_rpc` does."""
        if "method" not in body:
            return 400, "Missing 'method' in request body"
        self.weights = body["kwargs"]["weights_path"]
        self.num_reloads += 1
        return 200, {"results": [None]}


def but_at(path: str, fake: Callable, act: Callable[[dict | None], Answer]) -> Callable[[str, dict | None], Answer]:
    """Answers as `fake` does, but at one path as `act(body)` says, if it says something."""
    return lambda asked, body: (act(body) if asked == path else None) or fake(asked, body)


def make_requests(num: int, at: int | None = None, action: Callable | None = None) -> Iterator[CompletionRequest]:
    """Requests number 0 to `num`; `action` is called when number `at` is taken."""
    for row in range(num):
        if row == at:
            action()
        yield CompletionRequest((row, 0), [20 + row, 6], seed=row)


def publish(sampler: OpponentSampler, checkpoint: Path | None, iteration: int = 1) -> OpponentSampler:
    """Have it play an opponent."""
    sampler.publish(iteration, checkpoint)
    sampler.select(iteration, checkpoint)
    return sampler


def assert_all_are_the_opponents(completions: Iterable[Completion], num: int) -> None:
    """Each exactly once, to its own prompt, and by nobody else."""
    answers = sorted((completion.key, completion.token_ids) for completion in completions)
    assert answers == [((row, 0), [20 + row, OPPONENT, END]) for row in range(num)]
