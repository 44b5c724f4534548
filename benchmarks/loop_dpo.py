"""Training of one iteration by hand, as users do it without a trainer for it: a DPO run with its own reference model.

    accelerate launch benchmarks/loop_dpo.py MODEL PAIRS_FILE OUTPUT_DIR SEED

The settings are those of `recipes/pronunciation.yaml`.
"""

import sys
from pathlib import Path

import yaml
from datasets import load_dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer


RECIPE = Path(__file__).parents[1] / "recipes" / "pronunciation.yaml"
_SHARED = ("beta", "learning_rate", "lr_scheduler_type", "warmup_steps", "per_device_train_batch_size", "use_cpu")
_SHARED += ("bf16", "gradient_checkpointing", "logging_steps", "report_to")


def main(model: str, pairs_file: str, output_dir: str, seed: str) -> None:
    recipe = yaml.safe_load(RECIPE.read_text())
    shared = {name: recipe[name] for name in _SHARED}
    args = DPOConfig(
        output_dir, num_train_epochs=recipe["epochs_per_iteration"], save_strategy="no", seed=int(seed), **shared
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    dataset = load_dataset("json", data_files=pairs_file, split="train")
    trainer = DPOTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(output_dir)


if __name__ == "__main__":
    main(*sys.argv[1:])
