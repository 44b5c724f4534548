"""How many completions one client process takes from a server that answers at once, written to disk as in a run.

    make bench ARGS=client

The client is a run's own: the sampler, the job that divides the prompts, and the store that writes the parts. The
server (`instant_server.py`) is a process of its own. Prompts of 20 tokens, answers of 10. Target: 2,000 a second.
"""

import argparse
import cProfile
import pstats
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from datasets import Dataset
from measure import ROOT, write_result

from spin_trl.generation.sampler import SamplingParams
from spin_trl.generation.vllm.http_api import VLLMServer
from spin_trl.generation.vllm.sampler import VLLMSampler
from spin_trl.play.answers import GenerationJob, Share
from spin_trl.run_directory.store import IterationStore


TARGET = 2000  # completions a second
PARAMS = SamplingParams(max_completion_length=16, end_token_ids=(2,))


def make_prompts(num_prompts: int) -> Dataset:
    source = np.random.default_rng(0)
    prompt_ids = source.integers(10, 100, size=(num_prompts, 20)).tolist()
    return Dataset.from_dict({"row": range(num_prompts), "prompt_ids": prompt_ids})


def complete(address: str, prompts: Dataset, lora_rank: int | None) -> float:
    """Seconds until the completions of all prompts are on disk."""
    sampler = VLLMSampler("toy", lora_rank)
    with tempfile.TemporaryDirectory() as folder:
        sampler.connect(VLLMServer(address), "benchmark", min_context_length=2)
        sampler.publish(0, None)
        sampler.select(0, None)
        job = GenerationJob(IterationStore(folder, "run"), 0, "generations", PARAMS)
        started = time.perf_counter()
        job.run(sampler, prompts, Share())
        seconds = time.perf_counter() - started
        assert len(job.missing_rows(prompts)) == 0
        sampler.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="print where the time goes instead")
    options = parser.parse_args()
    command = [sys.executable, str(ROOT / "benchmarks" / "instant_server.py"), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = server.stdout.readline().strip()
        prompts = make_prompts(options.prompts)
        if options.profile:
            profile = cProfile.Profile()
            profile.runcall(complete, address, prompts, 8)
            pstats.Stats(profile).sort_stats("tottime").print_stats(35)
            return
        rates = [len(prompts) / complete(address, prompts, 8) for _ in range(options.rounds)]
    finally:
        server.terminate()
        server.wait()
    print(f"{statistics.median(rates):.0f} completions/s (of {[round(rate) for rate in rates]}; target: {TARGET})")
    write_result("client", {"completions_per_second": rates, "at_least": TARGET, "prompts": len(prompts)})


if __name__ == "__main__":
    main()
