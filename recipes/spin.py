"""Play SPIN from the shell: prompts and ground truths in, a better model out.

    accelerate launch recipes/spin.py --config recipes/pronunciation.yaml [--any_field value]

Every field of `SPINConfig`, of TRL's `ModelConfig` (model, LoRA, quantization) and of the arguments below can be set in
the YAML file and overridden on the command line. The algorithm is in `spin_trl`; this script parses, builds, trains
and saves.
"""

import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from spin_trl import SamplerError, SPINConfig, SPINTrainer
from spin_trl.run_directory.run_paths import RunDirectoryError


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
    preference_file: str | None = field(
        default=None,
        metadata={
            "help": "Preference pairs (`prompt`, `chosen`, `rejected`) to train on in every iteration beside the "
            "opponent's. See `preference_dataset` of `SPINTrainer`."
        },
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Python functions that give rewards to ground truths and generations, each as 'file.py:function'. "
            "See `reward_funcs` of `SPINTrainer`, and `pairing`."
        },
    )


# ending -> builder of `datasets`, what the file holds
_FILE_FORMATS = {
    ".jsonl": ("json", "one JSON object a line"),
    ".json": ("json", "a list of JSON objects, or one a line"),
    ".csv": ("csv", "a line of column names, then one line a row"),
    ".tsv": ("csv", "a line of column names, then one line a row"),
    ".parquet": ("parquet", "a Parquet file"),
}


def load_file(path: str) -> Dataset:
    """One local file as a dataset; its ending says how to read it."""
    suffix = Path(path).suffix
    if suffix not in _FILE_FORMATS or not Path(path).is_file():
        found = "is no file" if suffix in _FILE_FORMATS else f"ends in {suffix!r}"
        raise ValueError(
            f"Expected an existing file that ends in one of {sorted(_FILE_FORMATS)}, got {path!r}, which {found}. "
            "Correct the path, or convert the file."
        )
    builder, content = _FILE_FORMATS[suffix]
    if Path(path).stat().st_size == 0:
        raise ValueError(f"{path!r} is empty: expected is {content}. See what should have written it.")
    # Spreadsheets separate by what the user's language uses.
    options = {"sep": _separator(path)} if builder == "csv" else {}
    try:
        return load_dataset(builder, data_files=path, split="train", **options)
    except (DatasetGenerationError, ValueError) as error:
        problem = _first_broken_line(path) or error.__cause__ or error
        raise ValueError(
            f"{path!r} cannot be read: {problem}. Expected is {content}. Correct or remove what is broken."
        ) from error


def _separator(path: str) -> str:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        names = file.readline()
    return max("\t;,", key=names.count)


def _first_broken_line(path: str) -> str | None:
    if Path(path).suffix == ".parquet":
        return None
    try:
        Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        return f"byte {error.start} ({error.object[error.start : error.end]!r}) is no UTF-8. Save the file as UTF-8"
    if Path(path).suffix != ".jsonl":
        return None
    for number, line in enumerate(Path(path).read_text(errors="replace").splitlines(), start=1):
        try:
            json.loads(line or "{}")
        except json.JSONDecodeError as error:
            return f"line {number} is no JSON ({error.msg} at character {error.pos + 1}): {line[:80]!r}"
    return None


def load_datasets(script_args: SPINScriptArguments) -> tuple[Dataset, Dataset | None]:
    """The training data, and the evaluation data if there is any."""
    if (script_args.train_file is None) == (script_args.dataset_name is None):
        raise ValueError(
            "Set either `train_file` (a local file) or `dataset_name` (of the hub), got "
            f"`train_file={script_args.train_file!r}` and `dataset_name={script_args.dataset_name!r}`."
        )
    if script_args.evaluate and script_args.eval_file is not None:
        raise ValueError(
            f"Set either `eval_file` (a local file) or `evaluate` (a split of the hub's dataset), got "
            f"`eval_file={script_args.eval_file!r}` and `evaluate=True`."
        )
    if script_args.evaluate and script_args.dataset_name is None:
        raise ValueError(
            "`evaluate=True` takes a split of `dataset_name`, but that is None and the data is a file. Set `eval_file` "
            "instead."
        )
    eval_dataset = load_file(script_args.eval_file) if script_args.eval_file else None
    if script_args.train_file is not None:
        return load_file(script_args.train_file), eval_dataset
    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    if script_args.evaluate:
        eval_dataset = _split(dataset, "dataset_test_split", script_args.dataset_test_split)
    return _split(dataset, "dataset_train_split", script_args.dataset_train_split), eval_dataset


def _split(dataset: DatasetDict, argument: str, name: str) -> Dataset:
    if name not in dataset:
        raise ValueError(f"`{argument}` is {name!r}, but the dataset has the splits {sorted(dataset)}. Set it to one.")
    return dataset[name]


def load_function(argument: str, location: str) -> Callable:
    """The function at 'file.py:function', which `argument` names."""
    path, separator, name = location.rpartition(":")
    if not separator or not Path(path).is_file():
        raise ValueError(
            f"`{argument}` must be 'file.py:function' with an existing file, got {location!r}. Correct the "
            "path; it is relative to the current directory."
        )
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        defined = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ValueError(
            f"`{argument}` names {name!r}, which {path} does not define as a function. Name one of {defined}."
        )
    return getattr(module, name)


def main(script_args: SPINScriptArguments, training_args: SPINConfig, model_args: ModelConfig) -> None:
    if model_args.load_in_4bit and model_args.dtype == "auto":
        raise ValueError(
            "`load_in_4bit` needs to know what to compute in, got `dtype='auto'`. Set `dtype: bfloat16` (or float32)."
        )
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    metrics = script_args.generation_metrics
    compute_generation_metrics = None if metrics is None else load_function("generation_metrics", metrics)
    reward_funcs = [load_function("reward_funcs", location) for location in script_args.reward_funcs or []]
    train_dataset, eval_dataset = load_datasets(script_args)
    trainer = SPINTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        compute_generation_metrics=compute_generation_metrics,
        reward_funcs=reward_funcs or None,
        preference_dataset=load_file(script_args.preference_file) if script_args.preference_file else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Saved the final model to {training_args.output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.accelerator.end_training()  # without it gloo may abort a process that ends


def _is_refusal(error: Exception) -> bool:
    """Whether this is a message to the user that says all. Any other error is shown with where it was raised."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    parser, package = Path(inspect.getfile(TrlParser)), Path(inspect.getfile(SPINTrainer)).parent
    speaks_to_user = raised_in in (Path(__file__).resolve(), parser.resolve()) or package.resolve() in raised_in.parents
    return speaks_to_user and isinstance(error, ValueError | FileExistsError | SamplerError | RunDirectoryError)


if __name__ == "__main__":
    parser = TrlParser((SPINScriptArguments, SPINConfig, ModelConfig))
    parser.set_defaults_with_config(resume="auto")  # the same command again goes on where it stopped
    try:
        main(*parser.parse_args_and_config())
    except KeyboardInterrupt:
        sys.exit("Interrupted. What is finished is on disk, and the same command goes on from there.")
    except Exception as error:
        if not _is_refusal(error):
            raise
        sys.exit("\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]))
