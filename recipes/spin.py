"""Play SPIN from the shell: prompts and ground truths in, a better model out.

    accelerate launch recipes/spin.py --config recipes/pronunciation.yaml [--any_field value]

Every field of `SPINConfig`, of TRL's `ModelConfig` (model, LoRA, quantization) and of the arguments below can be set in
the YAML file and overridden on the command line. The algorithm is in `spin_trl`; this script parses, builds, trains
and saves.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from spin_trl import SPINConfig, SPINTrainer


@dataclass
class SPINScriptArguments(ScriptArguments):
    """TRL's script arguments, and local files in place of a dataset of the hub."""

    train_file: str | None = field(
        default=None, metadata={"help": "Training data as JSON lines, CSV or Parquet, in place of `dataset_name`."}
    )
    eval_file: str | None = field(
        default=None, metadata={"help": "Evaluation data, answered by every opponent and by the final policy."}
    )
    evaluate: bool = field(
        default=False, metadata={"help": "Whether to evaluate on `dataset_test_split` of `dataset_name`."}
    )
    generation_metrics: str | None = field(
        default=None,
        metadata={
            "help": "Python function that scores the answers to the evaluation prompts, as 'file.py:function'. See "
            "`compute_generation_metrics` of `SPINTrainer`."
        },
    )


def load_file(path: str) -> Dataset:
    """One local file as a dataset; its ending says how to read it."""
    builders = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    suffix = Path(path).suffix
    if suffix not in builders or not Path(path).is_file():
        raise ValueError(f"Expected an existing file that ends in one of {sorted(builders)}, got {path!r}.")
    return load_dataset(builders[suffix], data_files=path, split="train")


def load_datasets(script_args: SPINScriptArguments) -> tuple[Dataset, Dataset | None]:
    """The training data, and the evaluation data if there is any."""
    if (script_args.train_file is None) == (script_args.dataset_name is None):
        raise ValueError(
            "Set either `train_file` (a local file) or `dataset_name` (of the hub), got "
            f"`train_file={script_args.train_file!r}` and `dataset_name={script_args.dataset_name!r}`."
        )
    if script_args.train_file is not None:
        train_dataset = load_file(script_args.train_file)
        return train_dataset, load_file(script_args.eval_file) if script_args.eval_file else None
    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    eval_dataset = dataset[script_args.dataset_test_split] if script_args.evaluate else None
    return dataset[script_args.dataset_train_split], eval_dataset


def load_function(location: str | None) -> Callable | None:
    """The function at 'file.py:function'."""
    if location is None:
        return None
    path, separator, name = location.rpartition(":")
    if not separator or not Path(path).is_file():
        raise ValueError(f"`generation_metrics` must be 'file.py:function' with an existing file, got {location!r}.")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise ValueError(f"`generation_metrics` names {name!r}, which {path} does not define.")
    return getattr(module, name)


def main(script_args: SPINScriptArguments, training_args: SPINConfig, model_args: ModelConfig) -> None:
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    train_dataset, eval_dataset = load_datasets(script_args)
    trainer = SPINTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        compute_generation_metrics=load_function(script_args.generation_metrics),
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Saved the final model to {training_args.output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


if __name__ == "__main__":
    parser = TrlParser((SPINScriptArguments, SPINConfig, ModelConfig))
    parser.set_defaults_with_config(resume="auto")  # the same command again goes on where it stopped
    main(*parser.parse_args_and_config())
