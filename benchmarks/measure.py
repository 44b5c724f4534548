"""What the benchmarks share: arguments, toy models, sides timed in turn, memory, fresh processes, and kept results.

Knows nothing of what is measured.
"""

import argparse
import json
import multiprocessing
import os
import platform
import runpy
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import yaml


ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
RESULTS = ROOT / "runs" / "benchmarks"

# Fields of a run that is measured on the CPU; nothing is written that is not part of what is measured.
ON_THE_CPU = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report": False,
    "report_to": "none",
    "disable_tqdm": True,
}
LAUNCH = "accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --cpu"


def parser(about: str, rounds: int | None = None) -> argparse.ArgumentParser:
    """Every benchmark has `--quick` and `--output`; those that repeat what they do have `--rounds`."""
    made = argparse.ArgumentParser(description=about.partition("\n")[0])
    made.add_argument("--quick", action="store_true", help="seconds, on toy sizes: it runs, its figures mean nothing")
    made.add_argument("--output", type=Path, help=f"folder of the results (default: {RESULTS.relative_to(ROOT)})")
    if rounds is not None:
        made.add_argument("--rounds", type=int, default=rounds, help=f"times that each side is measured ({rounds})")
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    os.environ["HF_HUB_OFFLINE"] = "1"  # no benchmark downloads anything
    options = made.parse_args()
    options.output = options.output or (RESULTS / "quick" if options.quick else RESULTS)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.quick and "rounds" in options:
        options.rounds = 1
    return options


def run(command: list[str | Path]) -> float:
    """Seconds that a command takes, from the repository's root. Ends the benchmark if it fails."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    words, started = [str(word) for word in command], time.perf_counter()
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return time.perf_counter() - started


def run_script(*words: str | Path, is_quick: bool, launch: bool = True) -> float:
    """
    Seconds that a script takes with its arguments: under `accelerate launch`, or by `python`. For trials it is run in a
    fork of a process that has done the imports.
    """
    if is_quick:
        started = time.perf_counter()
        with TemporaryDirectory() as folder, fresh_processes("self_play_family.runs") as pool:
            pool.submit(play_script, [str(word) for word in words], Path(folder, "log")).result()
        return time.perf_counter() - started
    threads = ["--num_cpu_threads_per_process", str(os.cpu_count())]
    return run([*([*LAUNCH.split(), *threads] if launch else [sys.executable]), *words])


def play_script(words: list[str], log: Path) -> None:
    """
    Run a script as `python` does, in this process, which is given up for it.

    Raises:
        `RuntimeError`: with the end of what the script said, if it fails.
    """
    os.chdir(ROOT)
    sys.argv, sys.path[:0] = words, [str(Path(words[0]).resolve().parent)]
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        runpy.run_path(words[0], run_name="__main__")
    except BaseException as error:
        sys.stdout.flush()
        raise RuntimeError(f"{' '.join(words)} failed: {error!r}\n{log.read_text()[-6000:]}") from error
    sys.stdout.flush()


def flags(**arguments: Any) -> list[str]:
    return [text for name, value in arguments.items() for text in (f"--{name}", str(value))]


# Models and runs


def make_model(
    folder: Path, vocab_size: int, hidden_size: int, num_layers: int, longest: int, intermediate_size: int | None = None
) -> int:
    """
    Write a Llama that has learned nothing, and a tokenizer of one character a token. Token 0 ends, 1 fills.

    Returns:
        `int`: The number of parameters.
    """
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {"</s>": 0, "<pad>": 1, **{as_text([i]): i for i in range(2, vocab_size)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or 4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=max(2, hidden_size // 64),
        max_position_embeddings=longest,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model.num_parameters()


def as_text(token_ids: list[int]) -> str:
    """One character a token, of a plane of Unicode that has enough."""
    return "".join(chr(0x20000 + i) for i in token_ids)


def write_demo_config(path: Path, without: list[str], **changes: Any) -> None:
    """The demo's configuration, `recipes/pronunciation.yaml`, without some fields and with others changed."""
    fields = yaml.safe_load((RECIPES / "pronunciation.yaml").read_text())
    kept = {name: value for name, value in fields.items() if name not in without}
    path.write_text(yaml.safe_dump({**kept, **changes}))


def make_untrained_start(folder: Path) -> None:
    """The demo's model before its SFT, for trials."""
    sys.path.insert(0, str(RECIPES))  # recipes are scripts, not a package
    from pronunciation_sft import DATA_DIR, build_model, build_tokenizer

    rows = (json.loads(line) for line in (DATA_DIR / "train.jsonl").read_text().splitlines())
    tokenizer = build_tokenizer(sorted({phone for row in rows for phone in row["completion"].split()}))
    build_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """Of every iteration of a run, as it left them."""
    paths = sorted(output_dir.glob("iteration-*/metrics.json"), key=lambda path: int(path.parent.name.split("-")[1]))
    return [json.loads(path.read_text()) for path in paths]


@contextmanager
def instant_server(model: str | Path, *arguments: str) -> Iterator[str]:
    """The address of a process that claims to play a model and answers at once."""
    command = [sys.executable, str(ROOT / "benchmarks" / "instant_server.py"), "--model", str(model), *arguments]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield server.stdout.readline().strip()
    finally:
        server.terminate()
        server.wait()


# Measuring


def in_turn(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """Call every side once, then every side again, ..., so that a machine that slows down slows all of them."""
    found: dict[str, list[Any]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            found[name].append(side())
    return found


def ratio(figures: dict[str, list[float]], side: str, to: str) -> float:
    """Median over the rounds of one side's figure divided by another's of the same round."""
    return statistics.median(a / b for a, b in zip(figures[side], figures[to], strict=True))


class PeakMemory:
    """
    A context that watches the resident memory of this process. `growth` is in bytes, from when it was entered.

    Args:
        interval (`float`): Seconds between two looks.
    """

    def __init__(self, interval: float = 0.005):
        self.process, self.interval = psutil.Process(), interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self.start = self.peak = self.process.memory_info().rss
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._done.set()
        self._thread.join()

    @property
    def growth(self) -> int:
        return self.peak - self.start

    def _watch(self) -> None:
        while not self._done.wait(self.interval):
            self.peak = max(self.peak, self.process.memory_info().rss)


@contextmanager
def fresh_processes(preload: str, num_processes: int = 1) -> Iterator[ProcessPoolExecutor]:
    """
    A pool whose processes do one task each, forked from one that has imported the module `preload`: importing alone
    takes longer than some tasks.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT), *filter(None, sys.path)])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    with ProcessPoolExecutor(num_processes, mp_context=context, max_tasks_per_child=1) as pool:
        yield pool


def machine() -> str:
    """Cores, processor, memory and Python, in words."""
    memory = psutil.virtual_memory().total / 2**30
    return f"{os.cpu_count()} cores, {platform.machine()}, {memory:.0f} GiB, Python {platform.python_version()}"


def write_result(options: argparse.Namespace, name: str, figures: dict[str, Any]) -> None:
    """Write a benchmark's figures with machine and date to `NAME.json`, and print where."""
    result = {"benchmark": name, "date": date.today().isoformat(), "machine": machine(), **figures}
    path = options.output / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{result['date']}, {result['machine']}. Written to {path}")
