"""How many completions a second one process can take from a server that answers at once, and write to its run.

The server has a process of its own. `--profile` shows where the time goes.
"""

import argparse
import cProfile
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from datasets import Dataset
from instant_server import NAME
from measure import ROOT, write_result

from spin_trl.completions import GenerationJob, Share
from spin_trl.generation.sampler import SamplingParams
from spin_trl.generation.vllm_api import VLLMServer
from spin_trl.generation.vllm_sampler import VLLMSampler
from spin_trl.iteration_store import IterationStore


NUM_PROMPTS = 10_000
ROUNDS = 3
TARGET = 2000.0  # completions/s on two cores


def make_prompts(count: int) -> Dataset:
    generator = random.Random(0)
    prompts = [generator.choices(range(5, 30_000), k=generator.randint(10, 40)) for _ in range(count)]
    return Dataset.from_dict({"row": list(range(count)), "prompt_ids": prompts})


def completions_per_second(base_url: str, prompts: Dataset, lora_rank: int | None) -> tuple[float, float]:
    """As in a run: the real sampler, and every part written to disk. Per second, and per second of this process's CPU
    time, which tells what it would be on a machine that does nothing else."""
    sampler = VLLMSampler(NAME, lora_rank)
    try:
        sampler.connect(VLLMServer(base_url), "benchmark", min_context_length=20)
        sampler.publish(0, None)
        sampler.select(0, None)
        with tempfile.TemporaryDirectory() as folder:
            job = GenerationJob(IterationStore(Path(folder)), 0, "generations", SamplingParams(64, (2,)))
            started, started_cpu = time.perf_counter(), time.process_time()
            job.run(sampler, prompts, Share())
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
            assert not job.missing_rows(prompts)
        return len(prompts) / seconds, len(prompts) / cpu_seconds
    finally:
        sampler.close()


def print_profile(base_url: str, prompts: Dataset) -> None:
    profile = cProfile.Profile(time.process_time)
    profile.runcall(completions_per_second, base_url, prompts, 8)
    profile.print_stats("tottime")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num-prompts", type=int, default=NUM_PROMPTS)
    parser.add_argument("--profile", action="store_true", help="one round only, and where its time went")
    options = parser.parse_args()
    command = [sys.executable, str(ROOT / "benchmarks" / "instant_server.py")]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        base_url = server.stdout.readline().strip()
        prompts = make_prompts(options.num_prompts)
        if options.profile:
            return print_profile(base_url, prompts)
        rates = {
            kind: [completions_per_second(base_url, prompts, lora_rank) for _ in range(ROUNDS)]
            for kind, lora_rank in (("lora", 8), ("full", None))
        }
    finally:
        server.terminate()
        server.wait()
    for kind, values in rates.items():
        rate, cpu_rate = (statistics.median(column) for column in zip(*values, strict=True))
        print(f"{kind}: {rate:.0f} completions/s (target: at least {TARGET:.0f}), {cpu_rate:.0f} a second of CPU time")
    write_result("client", {"completions_per_second": rates, "num_prompts": options.num_prompts, "target": TARGET})


if __name__ == "__main__":
    main()
