"""Runs for machines with an NVIDIA GPU, written such that the same code runs on a CPU with a tiny model.

`test_gpu.py` says where, how large and what is expected.
"""

import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from conftest import TINY_RUN, read_rows, train_briefly
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, TrainerCallback

from spin_trl import SPINConfig, SPINTrainer


# Sizes of a Llama without its embeddings, which the demo's tokenizer keeps small: 0.1, 50 and 680 million parameters.
SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    "small": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8},
    "large": {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 12},
}


@dataclass(frozen=True)
class Place:
    device: str  # "cuda" or "cpu"
    size: str  # of `SIZES`

    def __str__(self) -> str:
        return f"{self.size} on {self.device}"

    def make_model(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
        """Write a model in bfloat16 to a folder; the tiny one is barely trained, the others not at all."""
        torch.manual_seed(0)
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **ids, **SIZES[self.size])
        with torch.device(self.device):
            model = LlamaForCausalLM(config)
        if self.size == "tiny":
            train_briefly(model, tokenizer)
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)


@dataclass
class Memory:
    """GPU memory at one moment, in bytes."""

    policy: int  # what this process has allocated
    others: int  # what is in use, but not by this process's allocator: the server's, mainly

    @classmethod
    def now(cls) -> "Memory":
        free, total = torch.cuda.mem_get_info()
        return cls(torch.cuda.memory_allocated(), total - free - torch.cuda.memory_reserved())


class MemoryWatch(threading.Thread):
    """Looks at the GPU's memory, where there is one, many times a second, until it is stopped."""

    def __init__(self):
        super().__init__(daemon=True)
        self.seen: list[Memory] = []
        self.is_over = threading.Event()

    def run(self) -> None:
        while torch.cuda.is_available() and not self.is_over.wait(0.02):
            self.seen.append(Memory.now())


class Record(TrainerCallback):
    """What a run saw: losses and, where there is a GPU, its memory in learning steps and throughout."""

    def __init__(self, trainer: SPINTrainer):
        self.trainer = trainer
        self.losses: list[float] = []
        self.first_losses: list[float] = []  # of each iteration
        self.while_training: list[Memory] = []
        self.watch = MemoryWatch()
        trainer.add_callback(self)

    def on_train_begin(self, args, state, control, **kwargs):
        self.watch.start()

    def on_train_end(self, args, state, control, **kwargs):
        self.watch.is_over.set()
        self.watch.join()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            self.while_training.append(Memory.now())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])
            if state.global_step == self.trainer.run.place.first_step + 1:
                self.first_losses.append(logs["loss"])


def play(place: Place, kind: str, model: str, folder: Path, **settings) -> Record:
    """Play two iterations in bfloat16 with gradient checkpointing, with an adapter or with all weights."""
    own = {
        "use_cpu": place.device == "cpu",
        "bf16": True,
        "gradient_checkpointing": True,
        # Adapters beside weights in bfloat16; all weights in float32, computed with in bfloat16.
        "model_init_kwargs": {"dtype": "bfloat16" if kind == "lora" else "float32"},
        "num_iterations": 2,
        "learning_rate": 1e-4 if kind == "lora" else 1e-5,
    }
    trainer = SPINTrainer(
        model,
        SPINConfig(output_dir=str(folder), **{**TINY_RUN, **own, **settings}),
        train_dataset=Dataset.from_list(read_rows("accent_train.jsonl", 32)),
        eval_dataset=Dataset.from_list(read_rows("accent_test.jsonl", 8)),
        peft_config=LoraConfig(r=8, target_modules="all-linear") if kind == "lora" else None,
    )
    record = Record(trainer)
    trainer.train()
    return record
