"""Small models of characters, and supervised fine-tuning with TRL's `SFTTrainer`. Knows nothing of tasks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from .task import Row


_MAX_LENGTH = 64

# As the self-play's, whatever the method: a model this small gains nothing from half precision.
COMMON_ARGUMENTS = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,  # a share of the schedule
    "train_sampling_strategy": "random",
    "logging_steps": 1000,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def character_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """One token a character, `<s>` before the text."""
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *characters]
    token_ids = {token: token_id for token_id, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(token_ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=_MAX_LENGTH,
    )


def small_llama(tokenizer: PreTrainedTokenizerBase, hidden_size: int, num_layers: int) -> LlamaForCausalLM:
    """A Llama with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=8 * hidden_size // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=_MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model, in float32, and tokenizer."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), AutoTokenizer.from_pretrained(folder)


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
    **arguments: Any,
) -> None:
    """
    Train a model in place.

    Args:
        folder (`Path`): Trainer's output directory, in which nothing is left.
        arguments: Fields of [`~trl.SFTConfig`].
    """
    config = SFTConfig(output_dir=str(folder), **{**COMMON_ARGUMENTS, **arguments})
    trainer = SFTTrainer(
        model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=list(callbacks)
    )
    trainer.train()
