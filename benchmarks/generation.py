"""Prompts per second through the sampler, from a real vLLM server, next to other ways to ask the same server.

    make bench ARGS=generation

1,024 prompts of 10 to 40 tokens, 48 new tokens each, from a Llama of 2.5 million parameters made from its config:

- `spin`: as a run does it: the sampler, and the parts written to disk;
- `bare`: a dozen lines that keep 256 requests in flight and throw the answers away; `bare 512`: 512 requests;
- `trl`: `VLLMClient.generate` of TRL, all prompts in one call, with its defaults (it asks for the sampled tokens'
  log-probs too); `trl, no logprobs`: without those.

The sides take turns, each with prompts that the server has never seen, so that none profits from its prefix cache.
Targets: at least 0.95 of the better of the bare ones, and 1.25 times TRL's client. About six minutes on two CPU cores.
"""

import argparse
import asyncio
import itertools
import tempfile
import time
from pathlib import Path

import aiohttp
import numpy as np
import torch
from datasets import Dataset
from measure import in_turn, ratio, write_result
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.generation import vllm_client

from spin_trl.generation.sampler import SamplingParams
from spin_trl.generation.vllm.http_api import VLLMServer
from spin_trl.generation.vllm.managed_server import ManagedServer
from spin_trl.generation.vllm.sampler import VLLMSampler
from spin_trl.play.answers import GenerationJob, Share
from spin_trl.run_directory.store import IterationStore


NUM_NEW_TOKENS = 48
VOCAB_SIZE = 1000
AT_LEAST_OF_BARE, AT_LEAST_OF_TRL = 0.95, 1.25
ALL_TOKENS = {"min_tokens": NUM_NEW_TOKENS, "ignore_eos": True}


def make_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {f"t{token_id}": token_id for token_id in range(VOCAB_SIZE)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "t0")), eos_token="t2", pad_token="t1"
    )
    tokenizer.save_pretrained(folder)


class Prompts:
    """Prompts, new ones at each call, of the same lengths."""

    def __init__(self, num_prompts: int):
        self.lengths = np.random.default_rng(0).integers(10, 41, size=num_prompts)
        self.calls = itertools.count(1)

    def __call__(self) -> list[list[int]]:
        source = np.random.default_rng(next(self.calls))
        return [source.integers(10, VOCAB_SIZE, size=length).tolist() for length in self.lengths]


class SpinSide:
    def __init__(self, server: ManagedServer, model: str, prompts: Prompts):
        self.prompts = prompts
        self.sampler = VLLMSampler(model, None)
        self.sampler.connect(VLLMServer(server.base_url, server.api_key), "benchmark", min_context_length=2)
        self.sampler.publish(0, None)
        self.sampler.select(0, None)

    def __call__(self) -> float:
        prompts = self.prompts()
        dataset = Dataset.from_dict({"row": range(len(prompts)), "prompt_ids": prompts})
        params = SamplingParams(NUM_NEW_TOKENS, (2,), extra=ALL_TOKENS)
        with tempfile.TemporaryDirectory() as folder:
            job = GenerationJob(IterationStore(folder, "run"), 0, "generations", params)
            started = time.perf_counter()
            job.run(self.sampler, dataset, Share())
            return len(prompts) / (time.perf_counter() - started)


class BareSide:
    def __init__(self, server: ManagedServer, model: str, prompts: Prompts, num_in_flight: int):
        self.url = f"{server.base_url}/v1/completions"
        self.headers = {"Authorization": f"Bearer {server.api_key}"}
        self.body = {"model": model, "max_tokens": NUM_NEW_TOKENS, "temperature": 1.0, **ALL_TOKENS}
        self.prompts, self.num_in_flight = prompts, num_in_flight

    def __call__(self) -> float:
        prompts = self.prompts()
        started = time.perf_counter()
        asyncio.run(self.send_all(iter(prompts)))
        return len(prompts) / (time.perf_counter() - started)

    async def send_all(self, prompts) -> None:
        async def send(session: aiohttp.ClientSession) -> None:
            for prompt in prompts:
                async with session.post(self.url, json={**self.body, "prompt": prompt}) as response:
                    response.raise_for_status()
                    await response.read()

        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, headers=self.headers) as session:
            await asyncio.gather(*(send(session) for _ in range(self.num_in_flight)))


class TRLSide:
    def __init__(self, server: ManagedServer, prompts: Prompts, logprobs: int | None):
        # It looks for a distribution called `vllm`; the one for CPUs has another name.
        vllm_client.is_vllm_available = lambda: True
        self.client = vllm_client.VLLMClient.__new__(vllm_client.VLLMClient)
        post = vllm_client.requests.Session
        self.prompts, self.logprobs = prompts, logprobs
        with_key = {"Authorization": f"Bearer {server.api_key}"}
        create = post.__init__

        def create_with_key(session, *args, **kwargs):
            create(session, *args, **kwargs)
            session.headers.update(with_key)

        post.__init__ = create_with_key
        try:
            self.client.__init__(base_url=server.base_url)
        finally:
            post.__init__ = create

    def __call__(self) -> float:
        prompts = self.prompts()
        started = time.perf_counter()
        answer = self.client.generate(
            prompts, max_tokens=NUM_NEW_TOKENS, logprobs=self.logprobs, generation_kwargs=ALL_TOKENS
        )
        seconds = time.perf_counter() - started
        assert {len(ids) for ids in answer["completion_ids"]} == {NUM_NEW_TOKENS}
        return len(prompts) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(folder, "model"))
        make_model(Path(model))
        server = ManagedServer(
            Path(folder, "log"), timeout=240, max_restarts=0, model=model, dtype="float32", max_model_length=128
        )
        server.start(show_progress=False)
        try:
            prompts = Prompts(options.prompts)
            sides = {
                "spin": SpinSide(server, model, prompts),
                "bare": BareSide(server, model, prompts, 256),
                "bare 512": BareSide(server, model, prompts, 512),
                "trl": TRLSide(server, prompts, 0),
                "trl, no logprobs": TRLSide(server, prompts, None),
            }
            BareSide(server, model, Prompts(256), 64)()  # what is slow the first time
            rates = in_turn(sides, options.rounds)
        finally:
            server.stop()
    for name, values in rates.items():
        print(f"{name}: {', '.join(f'{value:.1f}' for value in values)} prompts/s")
    ratios = {name: ratio(rates, "spin", to=name) for name in rates if name != "spin"}
    to_bare = min(ratios["bare"], ratios["bare 512"])
    print(f"spin / bare: {to_bare:.2f} (target: at least {AT_LEAST_OF_BARE})")
    print(f"spin / trl: {ratios['trl']:.2f} (target: at least {AT_LEAST_OF_TRL})")
    write_result("generation", {"prompts_per_second": rates, "spin_to": ratios})


if __name__ == "__main__":
    main()
