"""Speed and memory of one self-play iteration on a GPU, next to DPOTrainer with its reference model: `make bench-gpu`.

    python benchmarks/gpu.py [--pairs 256] [--repeats 3] [--tiny] [--cpu]

Both sides train a Llama of 0.8 billion parameters (`--tiny`: 0.2 million), made from its configuration, for two epochs
on as many pairs of as many tokens, in bfloat16 with gradient checkpointing; once with a LoRA adapter and once with all
weights. `DPOTrainer` computes its reference in every step, with the adapter off or with a second model. `SPINTrainer`
computes it once, before the first step, which is part of its time. What it needs besides, to have the pairs generated
in-process, is timed apart. Each side runs in a process of its own, in turn.

Without an NVIDIA GPU it says so and ends with success; `--tiny --cpu` shows that the code runs.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import in_turn, ratio, write_result


NUM_PROMPT_TOKENS, NUM_COMPLETION_TOKENS = 128, 256
LLAMA = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 12}
TINY_LLAMA = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS = ("lora", "full")
MORE_PAIRS_PER_SECOND, LESS_MEMORY = 1.0, 1.0  # targets: at least, and at most, DPOTrainer's


def words(num_tokens: int, generator: random.Random) -> str:
    return " ".join(f"w{generator.randrange(1000)}" for _ in range(num_tokens))


def make_model(folder: Path, is_tiny: bool) -> None:
    """A model that has learned nothing, and a tokenizer with one token a word."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {"</s>": 0, "<unk>": 1, **{f"w{i}": 2 + i for i in range(1000 if is_tiny else 31_998)}}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokens, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = TINY_LLAMA if is_tiny else LLAMA
    config = LlamaConfig(vocab_size=len(vocabulary), bos_token_id=None, eos_token_id=0, pad_token_id=0, **sizes)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


class Clock:
    """Seconds and memory from `start` to `stop`."""

    def __init__(self, on_cpu: bool):
        self.on_cpu = on_cpu

    def start(self) -> None:
        import torch

        if not self.on_cpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.started = time.monotonic()

    def stop(self) -> None:
        import resource

        import torch

        if not self.on_cpu:
            torch.cuda.synchronize()
        self.seconds = time.monotonic() - self.started
        if self.on_cpu:
            self.peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of the whole process so far
        else:
            self.peak = torch.cuda.max_memory_allocated()


def settings(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """What both sides have in common."""
    return {
        "output_dir": folder,
        "use_cpu": options.cpu,
        "bf16": True,
        "gradient_checkpointing": True,
        "model_init_kwargs": {"dtype": "bfloat16" if options.kind == "lora" else "float32"},
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-7,
        "max_length": None,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def make_rows(num_rows: int, columns: tuple[str, ...]):
    from datasets import Dataset

    generator = random.Random(0)
    lengths = {"prompt": NUM_PROMPT_TOKENS}
    return Dataset.from_list(
        [
            {name: words(lengths.get(name, NUM_COMPLETION_TOKENS), generator) for name in columns}
            for _ in range(num_rows)
        ]
    )


def adapter(kind: str):
    from peft import LoraConfig

    return LoraConfig(r=16, target_modules="all-linear") if kind == "lora" else None


def end_of_training(stop: Callable[[], None], start: Callable[[], None] | None = None):
    """A callback that calls these when training ends, and when it begins."""
    from transformers import TrainerCallback

    class Ends(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            if start is not None:
                start()

        def on_train_end(self, args, state, control, **kwargs):
            stop()

    return Ends()


def warm_up(trainer) -> None:
    """A forward and a backward pass, so that neither side pays for what a GPU loads at first."""
    import torch

    ids = torch.ones(2, 64, dtype=torch.long, device=trainer.accelerator.device)
    with trainer.accelerator.autocast():
        trainer.model(input_ids=ids, labels=ids).loss.backward()
    trainer.model.zero_grad(set_to_none=True)


def train_dpo(options: argparse.Namespace, folder: str) -> dict[str, float]:
    from trl import DPOConfig, DPOTrainer

    clock = Clock(options.cpu)
    config = DPOConfig(**settings(options, folder), num_train_epochs=2)
    trainer = DPOTrainer(
        options.model,
        args=config,
        train_dataset=make_rows(options.pairs, ("prompt", "chosen", "rejected")),
        peft_config=adapter(options.kind),
        callbacks=[end_of_training(clock.stop, clock.start)],
    )
    warm_up(trainer)
    trainer.train()
    return {"pairs_per_second": 2 * options.pairs / clock.seconds, "peak_gigabytes": clock.peak / 1e9}


def train_spin(options: argparse.Namespace, folder: str) -> dict[str, float]:
    """One iteration: from when its pairs are scored to the last step."""
    from spin_trl import SPINConfig, SPINTrainer, self_play

    clock = Clock(options.cpu)
    score_pairs = self_play.score_pairs

    def timed_from_here(*args, **kwargs):
        clock.start()
        return score_pairs(*args, **kwargs)

    self_play.score_pairs = timed_from_here
    config = SPINConfig(
        **settings(options, folder),
        num_iterations=1,
        epochs_per_iteration=2,
        max_completion_length=NUM_COMPLETION_TOKENS,
        identical_pairs="keep",
        use_vllm=False,
    )
    trainer = SPINTrainer(
        options.model,
        args=config,
        train_dataset=make_rows(options.pairs, ("prompt", "completion")),
        peft_config=adapter(options.kind),
        callbacks=[end_of_training(clock.stop)],
    )
    warm_up(trainer)
    trainer.train()
    num_tokens = sum(map(len, trainer.store.read_completions(0, "generations")["completion_ids"].to_pylist()))
    return {
        "pairs_per_second": 2 * options.pairs / clock.seconds,
        "peak_gigabytes": clock.peak / 1e9,
        "generated_tokens_per_second": num_tokens / trainer.store.read_metrics(0)["seconds_generate"],
    }


SIDES = {"spin": train_spin, "dpo": train_dpo}


def measure_side(side: str, kind: str, options: argparse.Namespace, model: str) -> dict[str, float]:
    """Run one side in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--side",
        side,
        "--kind",
        kind,
        "--model",
        model,
        "--pairs",
        str(options.pairs),
    ]
    command += ["--cpu"] if options.cpu else []
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(kind: str, options: argparse.Namespace, model: str) -> dict[str, Any]:
    sides = {side: lambda side=side: measure_side(side, kind, options, model) for side in SIDES}
    figures = in_turn(sides, options.repeats)
    speed = {side: [figure["pairs_per_second"] for figure in figures[side]] for side in SIDES}
    memory = {side: [figure["peak_gigabytes"] for figure in figures[side]] for side in SIDES}
    generated = [round(figure["generated_tokens_per_second"]) for figure in figures["spin"]]
    faster, larger = ratio(speed, "spin", "dpo"), ratio(memory, "spin", "dpo")
    print(f"{kind}: {faster:.2f} times DPOTrainer's pairs a second (target: at least {MORE_PAIRS_PER_SECOND})")
    print(f"{kind}: {larger:.2f} times its peak memory (target: at most {LESS_MEMORY})")
    print(f"{kind}: {max(generated):,} tokens a second generated in-process", flush=True)
    return {"figures": figures, "pairs_per_second_ratio": faster, "peak_memory_ratio": larger}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a model of 0.2 million parameters")
    parser.add_argument("--cpu", action="store_true", help="to see that it runs, not to measure")
    for name in ("side", "kind", "model"):  # for the processes that it starts
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.side is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(SIDES[options.side](options, folder)))
        return
    import torch

    if not options.cpu and not torch.cuda.is_available():
        print('Skipped: there is no NVIDIA GPU here. `ARGS="--tiny --cpu"` shows that the benchmark runs.')
        return
    with tempfile.TemporaryDirectory() as model:
        make_model(Path(model), options.tiny)
        results = {kind: compare(kind, options, model) for kind in KINDS}
    device = "CPU" if options.cpu else torch.cuda.get_device_name()
    write_result("gpu-dry-run" if options.cpu else "gpu", {"device": device, "pairs": options.pairs, **results})


if __name__ == "__main__":
    main()
