"""A server that speaks as much of vLLM's HTTP API as self-play needs, and answers at once. For benchmarks only.

    python benchmarks/instant_server.py --port 0 --model NAME

prints its address. An answer is random tokens, as many as `--length` says, and the first of the request's
`stop_token_ids`; the same seed gives the same answer.
"""

import argparse
import asyncio
import json
import random
import re


try:
    from uvloop import new_event_loop
except ImportError:
    from asyncio import new_event_loop

_CONTENT_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


class Connection(asyncio.Protocol):
    """One client's connection, which is kept open."""

    weight_version = "default"  # of the one server

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.received = bytearray()

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        while (end := self.received.find(b"\r\n\r\n")) >= 0:
            head = bytes(self.received[:end])
            length = _CONTENT_LENGTH.search(head)
            stop = end + 4 + (int(length[1]) if length else 0)
            if len(self.received) < stop:
                return
            body = bytes(self.received[end + 4 : stop])
            del self.received[:stop]
            self.reply(head.split(b" ", 2)[1].decode(), json.loads(body) if body else {})

    def reply(self, path: str, body: dict) -> None:
        status, answer = self.answer(path, body)
        content = json.dumps(answer).encode()
        head = f"HTTP/1.1 {status} -\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        self.transport.write(head.encode() + content)

    def answer(self, path: str, body: dict) -> tuple[int, dict]:
        if path == "/v1/completions":
            prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
            return 200, {"choices": [self.complete(body, prompt) for prompt in prompts]}
        if path == "/v1/models":
            name = self.options.model
            return 200, {"data": [{"id": name, "root": name, "max_model_len": self.options.max_model_length}]}
        if path == "/update_weight_version":
            self.options.weight_version = body["new_version"]
        if path == "/weight_info":
            return 200, {"weight_version": self.options.weight_version}
        if path == "/v1/load_lora_adapter" and body["lora_path"].startswith("/nonexistent"):
            return 404, {"error": f"{body['lora_name']} cannot be found"}
        if path == "/update_weight_version":
            Connection.weight_version = body["new_version"]
        if path == "/weight_info":
            return 200, {"weight_version": Connection.weight_version}
        return 200, {}

    def complete(self, body: dict, prompt: list[int]) -> dict:
        source = random.Random(body.get("seed"))
        length = min(self.options.length, body["max_tokens"])
        first, last = self.options.tokens
        token_ids = [source.randint(first, last) for _ in range(length - 1)] + body.get("stop_token_ids", [])[:1]
        return {"prompt_token_ids": prompt, "token_ids": token_ids, "finish_reason": "stop", "logprobs": None}


async def serve(options: argparse.Namespace) -> None:
    server = await asyncio.get_running_loop().create_server(
        lambda: Connection(options), "127.0.0.1", options.port, backlog=1024
    )
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--model", default="toy", help="name of the model that it claims to serve")
    parser.add_argument("--max-model-length", type=int, default=2048, help="tokens")
    parser.add_argument("--length", type=int, default=10, help="tokens of an answer, the end token included")
    parser.add_argument("--tokens", type=int, nargs=2, default=(10, 99), help="first and last token id to say")
    parser.set_defaults(weight_version="default")
    new_event_loop().run_until_complete(serve(parser.parse_args()))
