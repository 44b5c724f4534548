"""What a prompt costs, how fast the client is, and what memory a run takes, with 2,000, 20,000 and 200,000 prompts.

    make bench ARGS=scale [or: python benchmarks/scale.py --sizes 2000 20000]

Each size is one iteration in a process of its own: read, tokenise, generate, pair, describe, drop, score, write, read
back, and four training steps. The policy is a toy of two layers with an adapter, prompts have about 20 tokens and
answers 10, and the server (`instant_server.py`) answers at once, so that what is left is this library, TRL and the
HTTP client. A prompt's cost at a size is what it takes more than the smallest size, for each prompt more, so that the
start is no part of it. The largest size takes several minutes. Targets: a prompt of the largest size costs at most 1.1
times one of the size before it; memory grows by less than 200 MB; one client takes 2,000 completions a second.
"""

import json
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from datasets import load_dataset
from measure import (
    ON_THE_CPU,
    as_text,
    fresh_processes,
    instant_server,
    make_model,
    parse,
    parser,
    read_metrics,
    write_result,
)
from peft import LoraConfig

from spin_trl import SPINConfig, SPINTrainer


SIZES = [2_000, 20_000, 200_000]
VOCAB_SIZE = 200
LARGEST_RATIO, LARGEST_GROWTH, LEAST_RATE = 1.1, 200, 2000
PHASES = ("publish", "generate", "score", "train")


def write_prompts(path: Path, size: int) -> None:
    """Prompts of 15 to 25 tokens and ground truths of 9."""
    source = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(size):
            text = as_text(source.integers(2, VOCAB_SIZE, size=source.integers(15, 26) + 9).tolist())
            file.write(json.dumps({"prompt": text[:-9], "completion": text[-9:]}) + "\n")


def play(size: int, folder: Path, address: str) -> dict[str, Any]:
    """One size, in a process of its own."""
    started, started_cpu, memory = time.perf_counter(), time.process_time(), Memory()
    config = SPINConfig(
        output_dir=str(folder / f"run-{size}"),
        **ON_THE_CPU,
        vllm_server_base_url=address,
        num_iterations=1,
        max_steps=4,
        publish_check_tolerance=None,
        per_device_train_batch_size=32,
        precompute_ref_batch_size=256,
    )
    files, cache = str(folder / f"{size}.jsonl"), str(folder / f"cache-{size}")
    dataset = load_dataset("json", data_files=files, split="train", cache_dir=cache)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    SPINTrainer(str(folder / "toy"), config, train_dataset=dataset, peft_config=lora).train()
    (metrics,) = read_metrics(Path(config.output_dir))
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - started_cpu,
        "seconds_by_phase": {phase: metrics[f"seconds_{phase}"] for phase in PHASES},
        "completions_per_second": metrics["completions_per_second"],
        **memory.peaks(),
        "run_directory_mb": sum(x.stat().st_size for x in Path(config.output_dir).rglob("*") if x.is_file()) / 1e6,
    }


class Memory:
    """
    The largest resident memory of this process, as the kernel tells it: all of it (`VmRSS`), and what is no page of a
    mapped file (`RssAnon`), which it cannot drop when memory is short.
    """

    def __init__(self):
        self.peak = {"VmRSS": 0, "RssAnon": 0}
        threading.Thread(target=self._watch, daemon=True).start()

    def peaks(self) -> dict[str, float]:
        return {"peak_rss_mb": self.peak["VmRSS"] / 1e3, "peak_rss_anon_mb": self.peak["RssAnon"] / 1e3}

    def _watch(self) -> None:
        while True:
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in self.peak:
                    self.peak[name] = max(self.peak[name], int(value.split()[0]))  # kB
            time.sleep(0.05)


def cost_of_a_prompt(figures: dict[int, dict[str, Any]], size: int, kind: str) -> float:
    """Seconds that each prompt takes beyond those of the smallest size."""
    smallest = min(figures)
    return (figures[size][kind] - figures[smallest][kind]) / (size - smallest)


def show(size: int, figures: dict[str, Any]) -> None:
    phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in figures["seconds_by_phase"].items())
    print(
        f"{size:,} prompts: {figures['seconds']:.1f} s ({phases}), {figures['cpu_seconds']:.1f} s of processor time; "
        f"{figures['completions_per_second']:.0f} completions/s; peak {figures['peak_rss_mb']:.0f} MB, "
        f"{figures['peak_rss_anon_mb']:.0f} MB without pages of files; run directory "
        f"{figures['run_directory_mb']:.0f} MB",
        flush=True,
    )


def compare(figures: dict[int, dict[str, Any]]) -> dict[str, float]:
    """The largest size with the one before it, and with the smallest."""
    smallest, middle, largest = sorted(figures)
    summary = {
        f"{kind}_ratio": cost_of_a_prompt(figures, largest, kind) / cost_of_a_prompt(figures, middle, kind)
        for kind in ("seconds", "cpu_seconds")
    }
    for kind in ("rss", "rss_anon"):
        summary[f"{kind}_growth_mb"] = figures[largest][f"peak_{kind}_mb"] - figures[smallest][f"peak_{kind}_mb"]
    print(
        f"A prompt of {largest:,} costs {summary['seconds_ratio']:.2f} times one of {middle:,} by the clock, and "
        f"{summary['cpu_seconds_ratio']:.2f} times by the run's own processor time (target: at most {LARGEST_RATIO}). "
        f"From {smallest:,} to {largest:,} the peak of resident memory grows by {summary['rss_growth_mb']:.0f} MB "
        f"(target: less than {LARGEST_GROWTH}), without pages of files by {summary['rss_anon_growth_mb']:.0f} MB. "
        f"The client takes {figures[middle]['completions_per_second']:.0f} completions/s (target: {LEAST_RATE:,})."
    )
    return summary


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--sizes", type=int, nargs=3, default=SIZES, help="numbers of prompts")
    options = parse(arguments)
    figures: dict[int, dict[str, Any]] = {}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_model(folder / "toy", VOCAB_SIZE, hidden_size=32, num_layers=2, longest=2048)
        with instant_server(folder / "toy") as address, fresh_processes("scale") as pool:
            for size in sorted([10, 20, 40] if options.quick else options.sizes):
                write_prompts(folder / f"{size}.jsonl", size)
                figures[size] = one = pool.submit(play, size, folder, address).result()
                show(size, one)
    write_result(options, "scale", {"sizes": figures, **compare(figures)})


if __name__ == "__main__":
    main()
