"""A real vLLM server as a user starts one, with `python -m spin_trl.serve`, and the processes that belong to it."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from spin_trl.generation.sampler import Completion, CompletionRequest


SECONDS_TO_START = 300


class RealServer:
    """
    A vLLM server on a free loopback port, with an API key.

    Args:
        model (`str`): Folder of the model.
        log_path (`Path`): File for its output.
        *arguments (`str`): Of `spin_trl.serve`.
    """

    def __init__(self, model: str, log_path: Path, *arguments: str):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = str(listener.getsockname()[1])
        self.base_url = f"http://127.0.0.1:{port}"
        self.api_key = os.environ["VLLM_API_KEY"]  # which runs against it send too
        self.log_path = log_path
        self.argv = [sys.executable, "-m", "spin_trl.serve", model, "--port", port, "--dtype", "float32", *arguments]
        self.process: subprocess.Popen | None = None

    @property
    def fields(self) -> dict[str, str]:
        """Of `SPINConfig`, for a run against this server."""
        return {"vllm_server_base_url": self.base_url}

    def start(self) -> None:
        with self.log_path.open("a") as log:
            # A group of its own, by which all its processes can be ended.
            self.process = subprocess.Popen(self.argv, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        deadline = time.monotonic() + SECONDS_TO_START
        while not self.is_healthy():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log_path.read_text()[-3000:]
            time.sleep(0.5)

    def is_healthy(self) -> bool:
        try:
            return self.ask("/health")[0] == 200
        except OSError:
            return False

    def ask(self, path: str, body: dict | None = None, with_key: bool = True) -> tuple[int, str]:
        """Status and text of its answer."""
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base_url + path, content, {"Content-Type": "application/json"})
        if with_key:
            request.add_header("Authorization", f"Bearer {self.api_key}")
        try:
            with urllib.request.urlopen(request) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def kill(self) -> None:
        """End all its processes, as the system does when memory runs out."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            pass
        try:
            self.kill()
        except ProcessLookupError:
            pass


def make_opponent(model: str, folder: Path, kind: str, seed: int = 1) -> Path:
    """Write an adapter, or with `kind="full"` a model, that answers otherwise than the model does."""
    torch.manual_seed(seed)
    policy = AutoModelForCausalLM.from_pretrained(model)
    if kind == "lora":
        policy = get_peft_model(policy, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    else:
        for parameter in policy.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    policy.save_pretrained(folder)
    return folder


def make_requests(count: int) -> list[CompletionRequest]:
    """Prompts of many lengths, some of which would be read in two steps of the engine if that were not forbidden."""
    source = random.Random(0)
    prompts = [source.choices(range(5, 30), k=source.choice([3, 8, 30, 36])) for _ in range(count)]
    return [CompletionRequest((row, 0), prompt, seed=row) for row, prompt in enumerate(prompts)]


def by_key(completions: Iterator[Completion]) -> dict[tuple[int, int], list[int]]:
    answers = [(completion.key, completion.token_ids) for completion in completions]
    assert len(dict(answers)) == len(answers)  # none came twice
    return dict(answers)
