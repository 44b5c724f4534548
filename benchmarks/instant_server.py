"""A server that answers at once what a sampler asks of vLLM: `python benchmarks/instant_server.py --port 0`.

Prints its address. It reads no more of a request than it needs, so that whoever asks is the slower side.
"""

import argparse
import asyncio
import json


NAME = "org/base-model"
CONTEXT_LENGTH = 4096
_COMPLETION_TOKENS = 48


class InstantVLLM(asyncio.Protocol):
    """One connection. Marks, as full weights need them, are the server's."""

    attributes: set[str] = set()

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        while (end := self.received.find(b"\r\n\r\n")) >= 0:
            head = self.received[:end]
            size = end + 4 + _content_length(head)
            if len(self.received) < size:
                return
            content, self.received = self.received[end + 4 : size], self.received[size:]
            self.transport.write(self.answer(head.split(b" ", 2)[1].decode(), content))

    def answer(self, path: str, content: bytes) -> bytes:
        if path == "/v1/completions":
            return _COMPLETION
        if path == "/v1/models":
            base = {"id": NAME, "root": NAME, "parent": None, "max_model_len": CONTEXT_LENGTH}
            return _response({"data": [base]})
        if path == "/collective_rpc" and content.strip() not in (b"", b"{}"):
            return _response({"results": self.call_worker(json.loads(content))})
        return _response({}, 400 if path == "/collective_rpc" else 200)

    def call_worker(self, body: dict) -> list:
        if body["method"] == "__dir__":
            return [sorted(self.attributes)]
        if body["method"] == "__setattr__":
            self.attributes.add(body["args"][0])
        elif body["method"] == "__delattr__":
            self.attributes.discard(body["args"][0])
        return [None]


def _content_length(head: bytes) -> int:
    _, found, rest = head.lower().partition(b"content-length:")
    return int(rest.split(b"\r\n", 1)[0]) if found else 0


def _response(content: dict, status: int = 200) -> bytes:
    body = json.dumps(content).encode()
    head = f"HTTP/1.1 {status} OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


_COMPLETION = _response(
    {
        "choices": [
            {"index": 0, "text": "", "token_ids": [*range(10, 9 + _COMPLETION_TOKENS), 2], "finish_reason": "stop"}
        ]
    }
)


async def serve(port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(InstantVLLM, "127.0.0.1", port, backlog=1024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    try:
        from uvloop import run
    except ImportError:
        from asyncio import run
    run(serve(options.port))


if __name__ == "__main__":
    main()
