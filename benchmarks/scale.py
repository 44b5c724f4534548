"""What a prompt costs, and what memory a run takes, with 2,000, 20,000 and 200,000 prompts.

    python benchmarks/scale.py [--sizes 2000 20000]

Each size is one iteration in a process of its own: read, tokenise, generate, pair, describe, drop, score, write, read
back, and four training steps. The policy is a toy of two layers with an adapter, prompts have about 20 tokens and
answers 10, and the server (`instant_server.py`) answers at once, so that what is left is this library, TRL and the
HTTP client. Scoring and training depend on the model and are given apart. The largest size takes several minutes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from measure import ROOT, write_result


SIZES = (2_000, 20_000, 200_000)
VOCABULARY = 200  # words
LARGEST_RATIO, LARGEST_GROWTH = 1.1, 200  # of the cost per prompt at ten times the size; MB


def main(sizes: list[int]) -> None:
    """Play every size, one after the other, and compare the largest with the one before it and with the smallest."""
    figures: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as address:
        for size in sizes:
            write_prompts(Path(folder) / f"{size}.jsonl", size)
            command = [sys.executable, __file__, "--play", str(size), "--folder", folder, "--address", address]
            settings = {"HF_DATASETS_CACHE": f"{folder}/cache-{size}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True)
            if done.returncode != 0:
                raise SystemExit(done.stdout[-3000:] + done.stderr[-5000:])
            figures[size] = json.loads(done.stdout.splitlines()[-1])
            show(size, figures[size])
    summary: dict[str, Any] = {"sizes": figures}
    if len(sizes) > 1:
        small, middle, large = sizes[0], sizes[-2], sizes[-1]
        for name, kind in (("cost_ratio", "seconds_per_prompt"), ("cpu_cost_ratio", "cpu_seconds_per_prompt")):
            summary[name] = figures[large][kind] / figures[middle][kind]
        for kind in ("rss", "rss_anon"):
            summary[f"{kind}_growth_mb"] = figures[large][f"peak_{kind}_mb"] - figures[small][f"peak_{kind}_mb"]
        print(
            f"A prompt of {large:,} costs {summary['cost_ratio']:.2f} times one of {middle:,} by the clock, and "
            f"{summary['cpu_cost_ratio']:.2f} times by the run's own processor time (target: at most {LARGEST_RATIO}). "
            f"From {small:,} to {large:,} the peak of resident memory grows by {summary['rss_growth_mb']:.0f} MB "
            f"(target: less than {LARGEST_GROWTH}), without pages of files by {summary['rss_anon_growth_mb']:.0f} MB."
        )
    write_result("scale", summary)


def show(size: int, figures: dict[str, Any]) -> None:
    phases = ", ".join(f"{name} {1e6 * seconds / size:.0f}" for name, seconds in figures["cpu_seconds"].items())
    print(
        f"{size:,} prompts: without scoring and training {1e6 * figures['seconds_per_prompt']:.0f} us a prompt, "
        f"{1e6 * figures['cpu_seconds_per_prompt']:.0f} us of processor time (us by phase: {phases}); peak "
        f"{figures['peak_rss_mb']:.0f} MB, {figures['peak_rss_anon_mb']:.0f} MB without pages of files; run directory "
        f"{figures['run_directory_mb']:.0f} MB",
        flush=True,
    )


def write_prompts(path: Path, size: int) -> None:
    """Prompts of 15 to 25 words and ground truths of 9, a word being a token."""
    source = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(size):
            words = [f"w{number}" for number in source.integers(VOCABULARY, size=source.integers(15, 26) + 9)]
            file.write(json.dumps({"prompt": " ".join(words[:-9]), "completion": " " + " ".join(words[-9:])}) + "\n")


@contextmanager
def serving(folder: Path):
    """Make the toy, and yield the address of a server that claims to play it."""
    make_toy(folder / "toy")
    command = [sys.executable, str(ROOT / "benchmarks" / "instant_server.py"), "--model", str(folder / "toy")]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield server.stdout.readline().strip()
    finally:
        server.terminate()
        server.wait()


def make_toy(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["</s>", "<unk>", *(f"w{number}" for number in range(VOCABULARY))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


# One size, in a process of its own


def play(size: int, folder: Path, address: str) -> None:
    from datasets import load_dataset
    from peft import LoraConfig

    from spin_trl import SPINConfig, SPINTrainer, self_play, spin_trainer
    from spin_trl.play import setup as run_setup

    watch = Watch()
    run_setup.SelfPlaySetup.prepare = watch.timed("prepare", run_setup.SelfPlaySetup.prepare)
    spin_trainer.SPINTrainer._start_run = watch.timed("start", spin_trainer.SPINTrainer._start_run)
    callback = self_play.SelfPlayCallback
    callback._generate = watch.timed("generate", callback._generate)
    callback._pair_and_score = watch.timed("pair", callback._pair_and_score)
    self_play.score_pairs = watch.timed("score", self_play.score_pairs)
    config = SPINConfig(
        output_dir=str(folder / f"run-{size}"),
        vllm_server_base_url=address,
        num_iterations=1,
        max_steps=4,
        publish_check_samples=0,
        per_device_train_batch_size=32,
        precompute_ref_batch_size=256,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    dataset = watch.timed("load", load_dataset)("json", data_files=str(folder / f"{size}.jsonl"), split="train")
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SPINTrainer(str(folder / "toy"), config, train_dataset=dataset, peft_config=lora)
    watch.timed("all", trainer.train)()
    for seconds in (watch.seconds, watch.cpu_seconds):
        seconds["train"] = seconds.pop("all") - seconds["start"] - seconds["generate"] - seconds["pair"]
        seconds["pair"] -= seconds["score"]
    counted = ("prepare", "start", "generate", "pair")
    bytes_written = sum(path.stat().st_size for path in Path(config.output_dir).rglob("*") if path.is_file())
    figures = {
        "seconds_per_prompt": sum(watch.seconds[name] for name in counted) / size,
        "cpu_seconds_per_prompt": sum(watch.cpu_seconds[name] for name in counted) / size,
        "seconds": watch.seconds,
        "cpu_seconds": watch.cpu_seconds,
        **watch.peaks(),
        "peak_rss_after_mb": watch.peak_after,
        "run_directory_mb": bytes_written / 1e6,
    }
    print(json.dumps(figures))


class Watch:
    """
    Seconds of calls, and the largest resident memory of this process, as the kernel tells it: all of it (`VmRSS`), and
    what is no page of a mapped file (`RssAnon`), which it cannot drop when memory is short.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self.peak = {"VmRSS": 0, "RssAnon": 0}
        self.peak_after: dict[str, dict[str, float]] = {}
        threading.Thread(target=self._watch, daemon=True).start()

    def timed(self, name: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            started, started_cpu = time.perf_counter(), time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] = time.perf_counter() - started
                self.cpu_seconds[name] = time.process_time() - started_cpu
                self.peak_after[name] = self.peaks()

        return call

    def peaks(self) -> dict[str, float]:
        return {"peak_rss_mb": self.peak["VmRSS"] / 1e3, "peak_rss_anon_mb": self.peak["RssAnon"] / 1e3}

    def _watch(self) -> None:
        while True:
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in self.peak:
                    self.peak[name] = max(self.peak[name], int(value.split()[0]))  # kB
            time.sleep(0.05)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="numbers of prompts, ascending")
    parser.add_argument("--play", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.play is None:
        main(options.sizes)
    else:
        play(options.play, options.folder, options.address)
