"""
Builds the model on which the pronunciation demo plays SPIN: a Llama of 0.8 million parameters that reads a word's
letters and writes its phones, trained with TRL's `SFTTrainer` to the end of useful SFT: two minutes on two CPU cores.

    python recipes/pronunciation_sft.py

Model and tokenizer go to `runs/pronunciation/sft`, a folder that transformers and vLLM load as any other. The same
script trains a model further, for comparison with SPIN; every field of `SFTConfig` is an argument:

    python recipes/pronunciation_sft.py --init_from runs/pronunciation/sft \
        --train_file recipes/data/pronunciation/accent_train.jsonl --output_dir runs/pronunciation/accent_sft \
        --learning_rate 3e-4 --num_train_epochs 3 --per_device_train_batch_size 32

It knows nothing of SPIN. The measures printed at the end are those of `pronunciation_metrics.py`.
"""

import shutil
import string
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from pronunciation_metrics import compute_generation_metrics
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer, TrlParser


DATA_DIR = Path(__file__).parent / "data" / "pronunciation"
MAX_LENGTH = 64  # the longest row is 31 tokens: beginning, 14 letters, 15 phones, end


@dataclass
class ScriptArguments:
    train_file: str = field(
        default=str(DATA_DIR / "train.jsonl"), metadata={"help": "JSON lines with `prompt` and `completion`."}
    )
    init_from: str | None = field(
        default=None, metadata={"help": "Folder of a model to train further. If not set, a new model is made."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Train again although `output_dir` is there already."})
    evaluate: bool = field(default=True, metadata={"help": "Whether to measure the model at the end."})


def build_tokenizer(phones: list[str]) -> PreTrainedTokenizerFast:
    """
    One token a lower-case letter, one a phone (a run of upper-case letters). The change of case ends the prompt, so
    "barroom" is a prefix of "barroomB AO R UW M" in tokens too. Decoding puts the spaces between phones back.
    """
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *string.ascii_lowercase, *phones]
    token_ids = {token: token_id for token_id, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(token_ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("[a-z]|[A-Z]+"), "isolated"), pre_tokenizers.WhitespaceSplit()]
    )
    beginning = [("<s>", token_ids["<s>"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=beginning)
    space_before_phone = decoders.Replace(Regex("^(?=[A-Z])"), " ")
    no_space_before_first = decoders.Replace(Regex("(?<![A-Z]) "), "")
    tokenizer.decoder = decoders.Sequence([space_before_phone, decoders.Fuse(), no_space_before_first])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=MAX_LENGTH,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def pronounce(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, words: list[str]) -> list[str]:
    """The model's most likely phones for each word, by greedy decoding, all words in one batch."""
    batch = tokenizer(words, padding=True, return_tensors="pt").to(model.device)
    token_ids = model.generate(**batch, do_sample=False, max_length=MAX_LENGTH)
    return tokenizer.batch_decode(token_ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def train(script_args: ScriptArguments, training_args: SFTConfig) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    torch.manual_seed(training_args.seed)
    train_dataset = Dataset.from_json(script_args.train_file)
    if script_args.init_from is None:
        tokenizer = build_tokenizer(sorted({phone for row in train_dataset["completion"] for phone in row.split()}))
        model = build_model(tokenizer)
    else:
        tokenizer = AutoTokenizer.from_pretrained(script_args.init_from)
        model = AutoModelForCausalLM.from_pretrained(script_args.init_from, dtype=torch.float32)
    print(f"{model.num_parameters():,} parameters, {len(train_dataset):,} rows of {script_args.train_file}")
    trainer = SFTTrainer(model=model, args=training_args, train_dataset=train_dataset, processing_class=tokenizer)
    trainer.train()
    return model.eval(), tokenizer


def main(script_args: ScriptArguments, training_args: SFTConfig) -> None:
    output_dir = Path(training_args.output_dir)
    if output_dir.exists() and not script_args.overwrite:
        print(f"{output_dir} is there already, so it is complete. Pass `--overwrite` to train it again.")
        return

    # Everything is written under another name and renamed when whole, so that a folder that is there is complete.
    partial_dir = output_dir.with_name(output_dir.name + ".partial")
    if partial_dir.exists():
        shutil.rmtree(partial_dir)
    training_args.output_dir = str(partial_dir)
    model, tokenizer = train(script_args, training_args)
    model.save_pretrained(partial_dir)
    tokenizer.save_pretrained(partial_dir)
    if output_dir.exists():
        shutil.rmtree(output_dir)
    partial_dir.rename(output_dir)
    print(f"Saved to {output_dir}")
    for name in ("test.jsonl", "accent_test.jsonl") if script_args.evaluate else ():
        rows = Dataset.from_json(str(DATA_DIR / name))
        prompts, references = list(rows["prompt"]), list(rows["completion"])
        metrics = compute_generation_metrics(prompts, references, pronounce(model, tokenizer, prompts))
        print(name, {measure: round(value, 4) for measure, value in metrics.items()})


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, SFTConfig))
    parser.set_defaults_with_config(
        output_dir="runs/pronunciation/sft",
        learning_rate=2e-3,
        num_train_epochs=6,
        per_device_train_batch_size=64,
        warmup_steps=0.05,  # as a share of all steps
        use_cpu=not torch.cuda.is_available(),
        bf16=False,  # a model this small gains nothing from half precision
        gradient_checkpointing=False,  # and needs no memory saved
        logging_steps=100,
        save_strategy="no",
        report_to="none",
    )
    main(*parser.parse_args_and_config())
