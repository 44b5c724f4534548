"""Speed and memory of one iteration's training, next to TRL's `DPOTrainer` with its reference model on the same pairs.

    make bench ARGS=training

Both sides train every weight of the same model on the same pairs, whose lengths are log-normal, with the same batch
size, number of epochs and optimizer, each in a fresh process, in turn. DPOTrainer is configured as it is by default
(a reference model beside the policy); what it does with `precompute_ref_log_probs` is given besides. On the side of
self-play, scoring the pairs and writing them to disk counts, and answering does not: an instant sampler answers.
Targets: at least 1.15 times the pairs per second in two epochs; of the memory above the interpreter's, at most 0.85
with AdamW and 0.80 with RMSProp. About six minutes on two CPU cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measure import RESULTS, PeakMemory, in_turn, ratio, write_result


MIB = 2**20
FASTER, SMALLER_ADAMW, SMALLER_RMSPROP = 1.15, 0.85, 0.80


@dataclass(frozen=True)
class Workload:
    """
    A Llama and pairs of random tokens.

    Args:
        hidden_size, num_layers, vocab_size (`int`): The model.
        num_pairs (`int`): Pairs.
        prompt_length, answer_length (`int`): Medians, in tokens, of log-normal lengths.
        spread (`float`): Standard deviation of the logarithm of a length.
        longest (`int`): Tokens of a prompt or an answer at the most.
        batch_size, num_epochs (`int`): Of the training.
        optim (`str`): As in `TrainingArguments`.
    """

    hidden_size: int = 192
    num_layers: int = 3
    vocab_size: int = 512
    num_pairs: int = 192
    prompt_length: int = 24
    answer_length: int = 32
    spread: float = 0.7
    longest: int = 256
    batch_size: int = 8
    num_epochs: int = 2
    optim: str = "adamw_torch_fused"

    def make_model(self, folder: Path) -> None:
        """Write a model and a tokenizer, one token a character, to `folder`."""
        import torch
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=4 * self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.hidden_size // 64,
            max_position_embeddings=2 * self.longest + 2,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        words = {"<s>": 0, "</s>": 1, "<pad>": 2, **{as_text([i]): i for i in range(3, self.vocab_size)}}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
        )
        wrapped.save_pretrained(folder)

    def make_pairs(self) -> list[dict[str, list[int]]]:
        """Prompt, chosen and rejected ids of each pair; both sides end in the end token."""
        generator = np.random.default_rng(0)

        def tokens(median: int) -> list[int]:
            length = min(self.longest, 1 + int(generator.lognormal(np.log(median), self.spread)))
            return generator.integers(3, self.vocab_size, length).tolist()

        return [
            {
                "prompt_ids": tokens(self.prompt_length),
                "chosen_ids": tokens(self.answer_length) + [1],
                "rejected_ids": tokens(self.answer_length) + [1],
            }
            for _ in range(self.num_pairs)
        ]


def as_text(token_ids: list[int]) -> str:
    """One character a token."""
    return "".join(chr(0x4E00 + i) for i in token_ids)


SPEED = Workload()
# 113 million parameters on short pairs: what a step computes is small beside the weights.
MEMORY = Workload(
    hidden_size=768,
    num_layers=12,
    num_pairs=2,
    prompt_length=4,
    answer_length=4,
    longest=8,
    batch_size=1,
    num_epochs=1,
)
WORKLOADS = {"speed": SPEED, "adamw": MEMORY, "rmsprop": replace(MEMORY, optim="rmsprop")}


class CountTokens:
    """A collator that adds up the tokens, with padding, of all batches that it makes."""

    def __init__(self, collator: Callable[[list[dict]], dict[str, Any]]):
        self.collator = collator
        self.num_tokens = 0

    def __call__(self, examples: list[dict]) -> dict[str, Any]:
        batch = self.collator(examples)
        self.num_tokens += batch["input_ids"].numel()
        return batch


class InstantSampler:
    """Gives the prepared answers."""

    reads_checkpoints = False

    def __init__(self, pairs: list[dict[str, list[int]]]):
        self.pairs = pairs

    def sample(self, requests, params, logprobs=False):
        from spin_trl.generation.sampler import Completion

        for request in requests:
            yield Completion(request.key, self.pairs[request.key[0]]["rejected_ids"], "stop")

    def publish(self, iteration, checkpoint): ...

    def select(self, iteration, checkpoint): ...

    def close(self): ...


def common_settings(workload: Workload, folder: Path, device: str, dtype: str) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": workload.batch_size,
        "learning_rate": 1e-6,
        "optim": workload.optim,
        "max_length": None,
        "model_init_kwargs": {"dtype": dtype},
        "use_cpu": device == "cpu",
        "bf16": dtype == "bfloat16",
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1000,
        "seed": 1,
    }


def self_play(workload: Workload, model: Path, folder: Path, device: str, dtype: str):
    """A trainer that plays one iteration."""
    from datasets import Dataset

    from spin_trl import SPINConfig, SPINTrainer

    pairs = workload.make_pairs()
    config = SPINConfig(
        **common_settings(workload, folder, device, dtype),
        num_iterations=1,
        epochs_per_iteration=workload.num_epochs,
        max_completion_length=workload.longest + 1,
        use_vllm=False,
        report=False,  # no part of the training
    )
    rows = [{"prompt": as_text(x["prompt_ids"]), "completion": as_text(x["chosen_ids"][:-1])} for x in pairs]
    dataset = Dataset.from_list(rows)
    trainer = SPINTrainer(str(model), config, train_dataset=dataset)
    trainer.sampler = trainer.self_play.sampler = InstantSampler(pairs)
    return trainer


def dpo(workload: Workload, model: Path, folder: Path, device: str, dtype: str, precomputes: bool = False):
    """A DPOTrainer on the same pairs of token ids, which it has no way to be given but this."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class FromTokens(DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

    config = DPOConfig(
        **common_settings(workload, folder, device, dtype),
        num_train_epochs=workload.num_epochs,
        precompute_ref_log_probs=precomputes,
    )
    return FromTokens(str(model), args=config, train_dataset=Dataset.from_list(workload.make_pairs()))


SIDES = {"spin": self_play, "dpo": dpo, "dpo, precomputed": partial(dpo, precomputes=True)}


@contextmanager
def peak_memory(device: str):
    """Yields a function that gives the bytes taken at the most since the context was entered."""
    if device == "cpu":
        with PeakMemory(interval=0.005) as memory:
            yield lambda: memory.growth
        return
    import torch

    torch.cuda.reset_peak_memory_stats()
    yield torch.cuda.max_memory_allocated


def measure_side(
    side: str, workload: Workload, model: Path, folder: Path, device: str = "cpu", dtype: str = "float32"
) -> dict[str, float]:
    """
    Train one side once. To be called in a fresh process, since memory is measured above what it holds now.

    Args:
        side (`str`): One of `SIDES`.
        workload ([`Workload`]): What to train on.
        model (`Path`): Folder of the workload's model.
        folder (`Path`): Empty; to write to.
        device (`str`): `"cpu"` or `"cuda"`.
        dtype (`str`): Of the weights.

    Returns:
        `dict` with `seconds`, of the training and, where there is one, of the scoring before it; `seconds_scoring`, of
        that alone, where it can be told; `pairs_per_second`, of one epoch; `tokens`, with padding, that went
        through the collator; `peak_bytes`, from before the model is loaded.
    """
    # What a process imports at first use is none of the model's memory.
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401
    import trl  # noqa: F401
    from datasets import Dataset  # noqa: F401
    from trl import DPOTrainer  # noqa: F401

    import spin_trl.spin_trainer  # noqa: F401

    with peak_memory(device) as peak:
        # DPOTrainer scores the pairs, if it does, as soon as it is made.
        scoring = _time_scoring(DPOTrainer)
        trainer = SIDES[side](workload, model, folder, device, dtype)
        trainer.data_collator = counter = CountTokens(trainer.data_collator)
        started = time.perf_counter()
        trainer.train()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started + sum(scoring)
        figures = {"seconds": seconds, "peak_bytes": peak(), "tokens": counter.num_tokens}
    figures["pairs_per_second"] = workload.num_pairs * workload.num_epochs / seconds
    if side == "spin":
        figures["seconds_scoring"] = trainer.store.read_metrics(0)["seconds_score"]
    elif scoring:
        figures["seconds_scoring"] = sum(scoring)
    return figures


def _time_scoring(trainer_class: type) -> list[float]:
    """Seconds of each scoring that DPOTrainer does while it is made, as they come."""
    seconds, original = [], trainer_class._precompute_ref_logps

    def timed(self, *args, **kwargs):
        started = time.perf_counter()
        try:
            return original(self, *args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - started)

    trainer_class._precompute_ref_logps = timed
    return seconds


class FreshProcess:
    """Measures one side of a workload in a process of its own. `figures` holds what each call gave."""

    def __init__(self, side: str, workload: str, model: Path, figure: str):
        self.command = [sys.executable, __file__, "--side", side, "--workload", workload, "--model", str(model)]
        self.figure = figure
        self.figures: list[dict[str, float]] = []

    def __call__(self) -> float:
        with tempfile.TemporaryDirectory(dir=RESULTS) as folder:
            command = [*self.command, "--folder", folder]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
            if done.returncode != 0:
                raise SystemExit(f"{command} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
            self.figures.append(json.loads(Path(folder, "figures.json").read_text()))
        return self.figures[-1][self.figure]


def compare(workload: str, sides: list[str], figure: str, rounds: int) -> tuple[float, dict[str, list[dict]]]:
    """Self-play's figure divided by DPOTrainer's, and all figures of each side."""
    with tempfile.TemporaryDirectory(dir=RESULTS) as folder:
        WORKLOADS[workload].make_model(Path(folder))
        processes = {side: FreshProcess(side, workload, Path(folder), figure) for side in sides}
        found = ratio(in_turn(processes, rounds), "spin", to="dpo")
    return found, {side: process.figures for side, process in processes.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=sorted(WORKLOADS))
    parser.add_argument("--side", choices=sorted(SIDES), help="measure one side here; used by the benchmark itself")
    parser.add_argument("--workload", choices=sorted(WORKLOADS))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.side is not None:
        figures = measure_side(options.side, WORKLOADS[options.workload], options.model, options.folder / "run")
        (options.folder / "figures.json").write_text(json.dumps(figures))
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {}
    if options.only in (None, "speed"):
        times, figures = compare("speed", list(SIDES), "pairs_per_second", options.rounds)
        for side, measured in figures.items():
            print(f"{side}: {', '.join(format(m['pairs_per_second'], '.1f') for m in measured)} pairs/s", end="; ")
            print(f"{measured[0]['tokens']} tokens with padding", end="")
            print(f", scoring {measured[0]['seconds_scoring']:.1f} s" if "seconds_scoring" in measured[0] else "")
        print(f"speed, spin / dpo: {times:.2f} (target: at least {FASTER})", flush=True)
        result["speed"] = {**asdict(SPEED), "figures": figures, "spin_to_dpo": times, "at_least": FASTER}
    for name, limit in (("adamw", SMALLER_ADAMW), ("rmsprop", SMALLER_RMSPROP)):
        if options.only in (None, name):
            share, figures = compare(name, ["spin", "dpo"], "peak_bytes", options.rounds)
            for side, measured in figures.items():
                print(f"{side}: {', '.join(format(m['peak_bytes'] / MIB, '.0f') for m in measured)} MiB at the most")
            print(f"memory with {name}, spin / dpo: {share:.2f} (target: at most {limit})", flush=True)
            result[name] = {**asdict(WORKLOADS[name]), "figures": figures, "spin_to_dpo": share, "at_most": limit}
    write_result("training", result)


if __name__ == "__main__":
    main()
