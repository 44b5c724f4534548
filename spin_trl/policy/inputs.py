"""What is passed to the trainer beside data and configuration: of which kind it must be, and what comes with a model.

Loads no weights. Knows nothing of servers and run directories.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from ..spin_config import SPINConfig


def check_model(model: Any) -> None:
    """
    Raises:
        `TypeError`: if it is neither a name nor a loaded model.
        `ValueError`: if it names a folder that is missing or holds no model.
    """
    if isinstance(model, nn.Module):
        return
    if not isinstance(model, str):
        raise _wrong_type(
            "model",
            "a hub id, a folder (both `str`) or a loaded model",
            model,
            "Pass a path as `str(path)`, and a class as `Class.from_pretrained(...)`.",
        )
    folder = Path(model)
    if not folder.is_dir():
        if folder.is_file() or folder.is_absolute() or model.startswith((".", "~")) or not 0 < len(folder.parts) <= 2:
            found = "a file" if folder.is_file() else "nothing"
            raise ValueError(
                f"`model` is {model!r}, where there is {found}: expected a folder with a model, or a hub id such as "
                "'org/name'. Correct the path."
            )
    elif (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"`model` is the folder {model!r} of an adapter, but expected is a model. Pass the adapter loaded: "
            "`PeftModel.from_pretrained(base_model, folder, is_trainable=True)`."
        )
    elif not (folder / "config.json").is_file():
        raise ValueError(
            f"`model` is the folder {model!r}, which has no config.json: expected one that "
            "`model.save_pretrained(folder)` has written. Correct the path."
        )


def check_peft_config(peft_config: Any) -> None:
    """
    Raises:
        `TypeError`: if it is no configuration of PEFT.
        `ValueError`: if the adapter would be frozen.
    """
    if peft_config is None:
        return
    if not isinstance(peft_config, PeftConfig):
        remedy = "Write `LoraConfig(r=16, target_modules='all-linear')`."
        raise _wrong_type("peft_config", "a `PeftConfig`", peft_config, remedy)
    if peft_config.inference_mode:
        raise ValueError(
            "`peft_config` has `inference_mode=True`, which freezes the adapter, but it is what is to be trained. "
            "Set `inference_mode=False`."
        )


def check_generation_metrics(compute: Any, eval_dataset: Any) -> None:
    """
    Raises:
        `TypeError`: if it cannot be called.
        `ValueError`: if there is nothing to call it for.
    """
    if compute is None:
        return
    if not callable(compute):
        remedy = "Pass one that takes prompts, references and generations and returns a dict of numbers."
        raise _wrong_type("compute_generation_metrics", "a function", compute, remedy)
    if eval_dataset is None:
        raise ValueError(
            "`compute_generation_metrics` is given, but it scores the answers to `eval_dataset`, and that is None. "
            "Pass an `eval_dataset`, or leave the metrics out."
        )


def check_optimizers(optimizers: Any) -> None:
    """
    Raises:
        `TypeError`: if it is no pair.
    """
    if not isinstance(optimizers, tuple | list) or len(optimizers) != 2:
        expected = "a pair of an optimizer and a scheduler, each of which may be None"
        raise _wrong_type("optimizers", expected, optimizers, "Pass `(optimizer, None)`.")


def check_generation_kwargs(generation_kwargs: dict[str, Any] | None) -> None:
    """
    Raises:
        `ValueError`: if transformers' generation would not know one of them.
    """
    known = vars(GenerationConfig())
    unknown = sorted(set(generation_kwargs or {}) - set(known))
    if unknown:
        of_sampling = sorted(name for name in known if name.endswith(("_p", "_k", "_cutoff", "_penalty")))
        raise ValueError(
            f"`generation_kwargs` has {unknown}, but in-process generation takes the fields of transformers' "
            f"`GenerationConfig` only. Correct or remove them; sampling has {of_sampling}."
        )


def _wrong_type(argument: str, expected: str, found: Any, remedy: str) -> TypeError:
    return TypeError(f"`{argument}` must be {expected}, got {found!r} (`{type(found).__name__}`). {remedy}")


def source_kwargs(args: SPINConfig) -> dict[str, Any]:
    """How whatever belongs to the base model is to be loaded: with which `revision` and `trust_remote_code`."""
    revision = (args.model_init_kwargs or {}).get("revision")
    return {"revision": revision, "trust_remote_code": args.trust_remote_code}


def model_config(model: str | PreTrainedModel, args: SPINConfig) -> PretrainedConfig:
    """
    Raises:
        `ValueError`: if it cannot be loaded.
    """
    if not isinstance(model, str):
        return model.config
    with _explained("configuration", model):
        return AutoConfig.from_pretrained(model, **source_kwargs(args))


def load_tokenizer(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None, model_name: str, args: SPINConfig
) -> PreTrainedTokenizerBase:
    """
    The tokenizer as passed, or the model's own. It pads with the end token if it has no other.

    Raises:
        `TypeError`, `ValueError`: if there is none, or it has no end token.
    """
    if processing_class is None:
        with _explained("tokenizer", model_name):
            processing_class = AutoTokenizer.from_pretrained(model_name, **source_kwargs(args))
    if not isinstance(processing_class, PreTrainedTokenizerBase | ProcessorMixin):
        remedy = "Pass `AutoTokenizer.from_pretrained(...)`, or leave it out for the model's own."
        raise _wrong_type("processing_class", "a tokenizer", processing_class, remedy)
    tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no end token, so no answer could ever end. Set `tokenizer.eos_token` to the token at "
            "which the model stops, and pass the tokenizer as `processing_class`."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_token_ids(
    model: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: SPINConfig
) -> tuple[int, ...]:
    """Token ids at which the model stops: the tokenizer's end token first, then what its generation config adds."""
    if isinstance(model, str):
        try:
            config = GenerationConfig.from_pretrained(model, revision=source_kwargs(args)["revision"])
        except OSError:  # then the model's generation config is made from its own
            config = model_config(model, args).get_text_config()
    else:
        config = model.generation_config or GenerationConfig()
    also = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *(i for i in also if i is not None)]))


@contextmanager
def _explained(part: str, model: str) -> Iterator[None]:
    """In place of a library's own error in loading, one with the model's name and what to look at."""
    try:
        yield
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"The {part} of `model` {model!r} is code of its own, which is not run unless it is trusted. Read it, "
                "and if you do, set `trust_remote_code=True`."
            ) from error
        kind = "folder here" if Path(model).is_dir() else "hub id: see its spelling, access rights and the network"
        instead = " or pass `processing_class`" if part == "tokenizer" else ""
        raise ValueError(
            f"The {part} of `model` {model!r} cannot be read; expected is what `save_pretrained` writes. It is a "
            f"{kind}. Correct `model`{instead}. The library says: {error}"
        ) from error
