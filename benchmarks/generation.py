"""Prompts per second of a run, from a real vLLM server, next to other ways to ask the same server.

    make bench ARGS=generation

1,024 prompts of 10 to 40 tokens, 48 new tokens each, from a Llama of 2.5 million parameters made from its config:

- `spin`: the generation of a run of `SPINTrainer`, until the parts are on disk;
- `bare`: a dozen lines that keep 256 requests in flight and throw the answers away; `bare 512`: 512 requests;
- `trl`: `VLLMClient.generate` of TRL, all prompts in one call, with its defaults (it asks for the sampled tokens'
  log-probs too); `trl, no logprobs`: without those.

The sides take turns, each with prompts that the server has never seen, so that none profits from its prefix cache.
Targets: at least 0.95 of the better of the bare ones, and 1.25 times TRL's client. About six minutes on two CPU cores.
"""

import asyncio
import itertools
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp
import numpy as np
from datasets import Dataset
from measure import (
    ON_THE_CPU,
    as_text,
    in_turn,
    instant_server,
    make_model,
    parse,
    parser,
    ratio,
    read_metrics,
    write_result,
)
from trl.generation import vllm_client

from spin_trl import SPINConfig, SPINTrainer


NUM_NEW_TOKENS = 48
VOCAB_SIZE = 1000
PORT = 8765
AT_LEAST_OF_BARE, AT_LEAST_OF_TRL = 0.95, 1.25
ALL_TOKENS = {"min_tokens": NUM_NEW_TOKENS, "ignore_eos": True}


class Prompts:
    """Token ids of prompts, new ones at each call, of the same lengths."""

    def __init__(self, num_prompts: int):
        self.lengths = np.random.default_rng(0).integers(10, 41, size=num_prompts)
        self.calls = itertools.count(1)

    def __call__(self) -> list[list[int]]:
        source = np.random.default_rng(next(self.calls))
        return [source.integers(2, VOCAB_SIZE, size=length).tolist() for length in self.lengths]


def spin(address: str, model: Path, prompts: Prompts) -> float:
    rows = [{"prompt": as_text(ids), "completion": as_text([2])} for ids in prompts()]
    with TemporaryDirectory() as folder:
        config = SPINConfig(
            output_dir=folder,
            **ON_THE_CPU,
            vllm_server_base_url=address,
            num_iterations=1,
            max_steps=1,
            max_completion_length=NUM_NEW_TOKENS,
            generation_kwargs=ALL_TOKENS,
            publish_check_tolerance=None,
        )
        SPINTrainer(str(model), config, train_dataset=Dataset.from_list(rows)).train()
        return len(rows) / read_metrics(Path(folder))[0]["seconds_generate"]


def bare(address: str, model: Path, prompts: Prompts, num_in_flight: int) -> float:
    body = {"model": str(model), "max_tokens": NUM_NEW_TOKENS, "temperature": 1.0, **ALL_TOKENS}
    waiting = iter(prompts())

    async def send(session: aiohttp.ClientSession) -> None:
        for prompt in waiting:
            async with session.post(f"{address}/v1/completions", json={**body, "prompt": prompt}) as response:
                response.raise_for_status()
                await response.read()

    async def send_all() -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(*(send(session) for _ in range(num_in_flight)))

    started = time.perf_counter()
    asyncio.run(send_all())
    return len(prompts.lengths) / (time.perf_counter() - started)


def trl(client: vllm_client.VLLMClient, prompts: Prompts, logprobs: int | None) -> float:
    token_ids, started = prompts(), time.perf_counter()
    client.generate(token_ids, max_tokens=NUM_NEW_TOKENS, logprobs=logprobs, generation_kwargs=ALL_TOKENS)
    return len(token_ids) / (time.perf_counter() - started)


@contextmanager
def vllm_server(model: Path):
    """The address of a real server. It may still be starting."""
    words = ["--dtype", "float32", "--max-model-len", "128", "--port", str(PORT)]
    log = model.parent / "vllm-server.log"
    with log.open("w") as file:
        server = subprocess.Popen([sys.executable, "-m", "spin_trl.serve", model, *words], stdout=file, stderr=file)
    try:
        yield f"http://127.0.0.1:{PORT}"
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    arguments = parser(__doc__, rounds=3)
    arguments.add_argument("--prompts", type=int, default=1024)
    options = parse(arguments)
    options.prompts = 16 if options.quick else options.prompts
    prompts = Prompts(options.prompts)
    # It looks for a distribution called `vllm`; the one for CPUs has another name.
    vllm_client.is_vllm_available = lambda *args, **kwargs: True
    with TemporaryDirectory() as folder:
        model = Path(folder, "model")
        make_model(model, VOCAB_SIZE, 256, num_layers=4, longest=128, intermediate_size=512)
        serve = instant_server if options.quick else vllm_server
        with serve(model) as address:
            client = vllm_client.VLLMClient(base_url=address, connection_timeout=240)
            sides = {
                "spin": lambda: spin(address, model, prompts),
                "bare": lambda: bare(address, model, prompts, 256),
                "bare 512": lambda: bare(address, model, prompts, 512),
                "trl": lambda: trl(client, prompts, 0),
                "trl, no logprobs": lambda: trl(client, prompts, None),
            }
            bare(address, model, Prompts(min(256, options.prompts)), 64)  # what is slow the first time
            rates = in_turn(sides, options.rounds)
    for name, values in rates.items():
        print(f"{name}: {', '.join(f'{value:.1f}' for value in values)} prompts/s")
    ratios = {name: ratio(rates, "spin", to=name) for name in rates if name != "spin"}
    to_bare = min(ratios["bare"], ratios["bare 512"])
    print(f"spin / bare: {to_bare:.2f} (target: at least {AT_LEAST_OF_BARE})")
    print(f"spin / trl: {ratios['trl']:.2f} (target: at least {AT_LEAST_OF_TRL})")
    write_result(options, "generation", {"prompts_per_second": rates, "spin_to": ratios})


if __name__ == "__main__":
    main()
