"""Seconds from the save of an opponent to its first completion: a LoRA adapter against full weights.

    make bench ARGS=publish

A Llama of 113 million parameters in float32, two real vLLM servers, and the trainer's own path: the policy is saved
into the run directory, the server loads it, a prompt is completed by one token. Before each round the weights change.
Adapters are to be at least five times quicker.
"""

import argparse
import itertools
import json
import logging
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from datasets import Dataset
from measure import ROOT, in_turn, ratio, write_result
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from spin_trl import SPINConfig, SPINTrainer
from spin_trl.generation.sampler import CompletionRequest


sys.path.insert(0, str(ROOT / "recipes"))
from pronunciation_sft import build_tokenizer  # noqa: E402


TARGET = 5.0
STEPS = ("save", "load", "first completion")
LORA = LoraConfig(r=16, target_modules="all-linear")
DATA = ROOT / "recipes" / "data" / "pronunciation" / "train.jsonl"


def make_model(folder: str) -> int:
    """Write model and tokenizer; the number of parameters."""
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]
    tokenizer = build_tokenizer(sorted({phone for row in rows for phone in row["completion"].split()}))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


class Side:
    """One way to publish, with a trainer and a server of its own."""

    def __init__(self, model: str, output_dir: Path, peft_config: LoraConfig | None):
        config = SPINConfig(
            output_dir=str(output_dir),
            vllm_mode="managed",
            use_cpu=True,
            bf16=False,
            report_to="none",
            max_completion_length=8,
            disable_tqdm=True,
        )
        rows = [json.loads(line) for line in DATA.read_text().splitlines()[:16]]
        self.trainer = SPINTrainer(model, config, train_dataset=Dataset.from_list(rows), peft_config=peft_config)
        self.iterations = itertools.count(1)
        self.seconds: dict[str, list[float]] = {step: [] for step in STEPS}

    def __enter__(self) -> "Side":
        self.trainer.self_play_setup.open_sampler(self.trainer.sampler)
        return self

    def __exit__(self, *exception) -> None:
        self.trainer.self_play_setup.close_sampler(self.trainer.sampler)

    def publish(self) -> float:
        """Seconds of one publication."""
        iteration = next(self.iterations)
        self._change_weights()
        sampler, times = self.trainer.sampler, [time.perf_counter()]
        checkpoint = self.trainer.self_play.opponents.save(iteration)
        times.append(time.perf_counter())
        sampler.publish(iteration, checkpoint)
        sampler.select(iteration, checkpoint)
        times.append(time.perf_counter())
        request = CompletionRequest((0, 0), self.trainer.self_play.dataset[0]["prompt_ids"], seed=iteration)
        next(sampler.sample([request], replace(self.trainer.self_play.params, max_completion_length=1)))
        times.append(time.perf_counter())
        for step, (start, end) in zip(STEPS, itertools.pairwise(times), strict=True):
            self.seconds[step].append(end - start)
        return times[-1] - times[0]

    def _change_weights(self) -> None:
        with torch.no_grad():
            for parameter in self.trainer.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01)


def main(num_rounds: int) -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=ROOT / "runs")))
        num_parameters = make_model(str(folder / "model"))
        sides = {
            name: stack.enter_context(Side(str(folder / "model"), folder / name, peft_config))
            for name, peft_config in (("lora", LORA), ("full", None))
        }
        for side in sides.values():
            side.publish()  # what only the first costs
        figures = in_turn({name: side.publish for name, side in sides.items()}, num_rounds)
    print(f"{num_parameters / 1e6:.0f} M parameters in float32, median of {num_rounds} rounds, seconds")
    for name, side in sides.items():
        steps = ", ".join(f"{step} {median(side.seconds[step][1:]):.2f}" for step in STEPS)
        print(f"{name}: {median(figures[name]):.2f} ({steps})")
    speedup = ratio(figures, "full", "lora")
    print(f"LoRA is {speedup:.1f} times quicker; the target is {TARGET:.0f}")
    steps = {name: {step: values[1:] for step, values in side.seconds.items()} for name, side in sides.items()}
    result = {"num_parameters": num_parameters, "seconds": figures, "steps": steps}
    write_result("publish", {**result, "speedup": speedup, "target": TARGET})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    main(parser.parse_args().rounds)
