"""Speed and memory of one iteration's training, next to TRL's `DPOTrainer` with its reference model on the same pairs.

    make bench ARGS=training

Both sides train every weight of the same model on the same pairs, whose lengths are log-normal, with the same batch
size, number of epochs and optimizer, each in a fresh process, in turn. DPOTrainer is configured as it is by default
(a reference model beside the policy); what it does with `precompute_ref_log_probs` is given besides. On the side of
self-play, scoring the pairs and writing them to disk counts, and answering does not: prepared answers are given.
Targets: at least 1.15 times the pairs per second in two epochs; of the memory above the interpreter's, at most 0.85
with AdamW and 0.80 with RMSProp. About six minutes on two CPU cores.
"""

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers.models.llama.modeling_llama  # noqa: F401 (imported here, it is none of a side's memory)
from datasets import Dataset
from measure import (
    PeakMemory,
    as_text,
    fresh_processes,
    in_turn,
    make_model,
    parse,
    parser,
    ratio,
    read_metrics,
    write_result,
)
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from spin_trl import Completion, OpponentSampler, SPINConfig, SPINTrainer


FASTER, SMALLER_ADAMW, SMALLER_RMSPROP = 1.15, 0.85, 0.80


@dataclass(frozen=True)
class Workload:
    """
    A Llama and pairs of random tokens.

    Args:
        hidden_size, intermediate_size, num_layers, vocab_size (`int`): The model.
        num_pairs (`int`): Pairs.
        prompt_length, answer_length (`int`): Medians, in tokens, of log-normal lengths.
        spread (`float`): Standard deviation of the logarithm of a length.
        longest (`int`): Tokens of a prompt or an answer at the most.
        batch_size, num_epochs (`int`): Of the training.
        optim (`str`): As in `TrainingArguments`.
        device (`str`): `"cpu"` or `"cuda"`.
        dtype (`str`): Of the weights.
        bf16 (`bool`): Whether to compute in bfloat16, with gradient checkpointing.
        lora (`bool`): Whether an adapter of rank 16 is trained in place of all weights.
    """

    hidden_size: int = 192
    intermediate_size: int = 768
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
    device: str = "cpu"
    dtype: str = "float32"
    bf16: bool = False
    lora: bool = False

    def make_model(self, folder: Path) -> None:
        room = 2 * self.longest + 2
        make_model(folder, self.vocab_size, self.hidden_size, self.num_layers, room, self.intermediate_size)

    def make_pairs(self) -> list[dict[str, list[int]]]:
        """Prompt, chosen and rejected ids of each pair; both sides end in the end token."""
        generator = np.random.default_rng(0)

        def tokens(median: int) -> list[int]:
            length = min(self.longest, 1 + int(generator.lognormal(np.log(median), self.spread)))
            return generator.integers(2, self.vocab_size, length).tolist()

        return [
            {
                "prompt_ids": tokens(self.prompt_length),
                "chosen_ids": tokens(self.answer_length) + [0],
                "rejected_ids": tokens(self.answer_length) + [0],
            }
            for _ in range(self.num_pairs)
        ]

    def settings(self, folder: Path) -> dict[str, Any]:
        """What both sides have in common."""
        return {
            "output_dir": str(folder),
            "per_device_train_batch_size": self.batch_size,
            "learning_rate": 1e-6,
            "optim": self.optim,
            "max_length": None,
            "model_init_kwargs": {"dtype": self.dtype},
            "use_cpu": self.device == "cpu",
            "bf16": self.bf16,
            "gradient_checkpointing": self.bf16,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }

    def adapter(self) -> LoraConfig | None:
        return LoraConfig(r=16, target_modules="all-linear") if self.lora else None


SPEED = Workload()
# 113 million parameters on short pairs: what a step computes is small beside the weights.
MEMORY = Workload(
    hidden_size=768,
    intermediate_size=3072,
    num_layers=12,
    num_pairs=2,
    prompt_length=4,
    answer_length=4,
    longest=8,
    batch_size=1,
    num_epochs=1,
)


class PreparedAnswers(OpponentSampler):
    """Knows all answers beforehand."""

    reads_checkpoints = False

    def __init__(self, pairs: list[dict[str, list[int]]]):
        self.pairs = pairs

    def publish(self, iteration, checkpoint, earlier=None):
        pass

    def sample(self, requests, params, logprobs=False):
        for request in requests:
            yield Completion(request.key, self.pairs[request.key[0]]["rejected_ids"], "stop")


class CountTokens:
    """A collator that adds up the tokens, with padding, of all batches that it makes."""

    def __init__(self, collator: Callable[[list[dict]], dict[str, Any]]):
        self.collator = collator
        self.num_tokens = 0

    def __call__(self, examples: list[dict]) -> dict[str, Any]:
        batch = self.collator(examples)
        self.num_tokens += batch["input_ids"].numel()
        return batch


def self_play(workload: Workload, model: Path, folder: Path) -> SPINTrainer:
    config = SPINConfig(
        **workload.settings(folder),
        num_iterations=1,
        epochs_per_iteration=workload.num_epochs,
        max_completion_length=workload.longest + 1,
        identical_pairs="keep",
        report=False,  # no part of the training
    )
    pairs = workload.make_pairs()
    rows = [{"prompt": as_text(x["prompt_ids"]), "completion": as_text(x["chosen_ids"][:-1])} for x in pairs]
    return SPINTrainer(
        str(model),
        config,
        train_dataset=Dataset.from_list(rows),
        sampler=PreparedAnswers(pairs),
        peft_config=workload.adapter(),
    )


class OnTokens(DPOTrainer):
    """A DPOTrainer that takes pairs of token ids, which it has no way to be given but this, and times its scoring."""

    seconds_scoring = 0.0

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    def _precompute_ref_logps(self, *args, **kwargs):
        started = time.perf_counter()
        try:
            return super()._precompute_ref_logps(*args, **kwargs)
        finally:
            self.seconds_scoring += time.perf_counter() - started


def dpo(workload: Workload, model: Path, folder: Path, precomputes: bool = False) -> DPOTrainer:
    settings = workload.settings(folder)
    config = DPOConfig(**settings, num_train_epochs=workload.num_epochs, precompute_ref_log_probs=precomputes)
    pairs = Dataset.from_list(workload.make_pairs())
    return OnTokens(str(model), args=config, train_dataset=pairs, peft_config=workload.adapter())


SIDES = {"spin": self_play, "dpo": dpo, "dpo, precomputed": partial(dpo, precomputes=True)}


@contextmanager
def peak_memory(device: str):
    """Yields a function that gives the bytes taken at the most since the context was entered."""
    if device == "cpu":
        with PeakMemory() as memory:
            yield lambda: memory.growth
    else:
        torch.cuda.reset_peak_memory_stats()
        yield torch.cuda.max_memory_allocated


def measure_side(side: str, workload: Workload, model: Path) -> dict[str, float]:
    """
    Train one side once. To be called in a fresh process, since memory is measured above what it holds now.

    Returns:
        `dict` with `seconds`, of the training and of the scoring before it; `seconds_scoring`, of that alone, where it
        can be told; `pairs_per_second`, of one epoch; `tokens`, with padding, that went through the collator;
        `peak_bytes`, from before the model is loaded.
    """
    with TemporaryDirectory() as folder, peak_memory(workload.device) as peak:
        trainer = SIDES[side](workload, model, Path(folder, "run"))
        trainer.data_collator = counter = CountTokens(trainer.data_collator)
        if workload.device == "cuda":
            warm_up(trainer)
        started = time.perf_counter()
        trainer.train()
        if workload.device == "cuda":
            torch.cuda.synchronize()
        # DPOTrainer scores the pairs, if it does, when it is made.
        seconds = time.perf_counter() - started + getattr(trainer, "seconds_scoring", 0.0)
        figures = {"seconds": seconds, "peak_bytes": peak(), "tokens": counter.num_tokens}
        if side == "spin":
            figures["seconds_scoring"] = read_metrics(Path(folder, "run"))[0]["seconds_score"]
        elif trainer.seconds_scoring:
            figures["seconds_scoring"] = trainer.seconds_scoring
    figures["pairs_per_second"] = workload.num_pairs * workload.num_epochs / seconds
    return figures


def warm_up(trainer) -> None:
    """A forward and a backward pass, so that neither side pays for what a GPU loads at first."""
    ids = torch.ones(2, 64, dtype=torch.long, device=trainer.accelerator.device)
    with trainer.accelerator.autocast():
        trainer.model(input_ids=ids, labels=ids).loss.backward()
    trainer.model.zero_grad(set_to_none=True)


def compare(workload: Workload, sides: list[str], rounds: int) -> dict[str, list[dict[str, float]]]:
    """All figures of each side."""
    with TemporaryDirectory() as folder, fresh_processes("training") as pool:
        workload.make_model(Path(folder))
        jobs = {side: lambda s=side: pool.submit(measure_side, s, workload, Path(folder)).result() for side in sides}
        return in_turn(jobs, rounds)


def spin_to_dpo(figures: dict[str, list[dict[str, float]]], name: str) -> float:
    return ratio({side: [f[name] for f in measured] for side, measured in figures.items()}, "spin", to="dpo")


def main() -> None:
    arguments = parser(__doc__, rounds=2)
    arguments.add_argument("--only", choices=("speed", "adamw", "rmsprop"))
    options = parse(arguments)
    speed, memory = SPEED, MEMORY
    if options.quick:
        speed = memory = replace(SPEED, hidden_size=64, intermediate_size=64, num_layers=1, num_pairs=8, num_epochs=1)
        options.only = options.only or "speed"
    result: dict[str, Any] = {}
    if options.only in (None, "speed"):
        figures = compare(speed, list(SIDES), options.rounds)
        for side, measured in figures.items():
            rates = ", ".join(f"{m['pairs_per_second']:.1f}" for m in measured)
            print(f"{side}: {rates} pairs/s; {measured[0]['tokens']} tokens with padding", end="")
            print(f", scoring {measured[0]['seconds_scoring']:.1f} s" if "seconds_scoring" in measured[0] else "")
        times = spin_to_dpo(figures, "pairs_per_second")
        print(f"speed, spin / dpo: {times:.2f} (target: at least {FASTER})", flush=True)
        result["speed"] = {**asdict(speed), "figures": figures, "spin_to_dpo": times, "at_least": FASTER}
    for name, optim, limit in (
        ("adamw", MEMORY.optim, SMALLER_ADAMW),
        ("rmsprop", "rmsprop", SMALLER_RMSPROP),
    ):
        if options.only in (None, name):
            workload = replace(memory, optim=optim)
            figures = compare(workload, ["spin", "dpo"], options.rounds)
            for side, measured in figures.items():
                print(f"{side}: {', '.join(format(m['peak_bytes'] / 2**20, '.0f') for m in measured)} MiB at the most")
            share = spin_to_dpo(figures, "peak_bytes")
            print(f"memory with {name}, spin / dpo: {share:.2f} (target: at most {limit})", flush=True)
            result[name] = {**asdict(workload), "figures": figures, "spin_to_dpo": share, "at_most": limit}
    write_result(options, "training", result)


if __name__ == "__main__":
    main()
