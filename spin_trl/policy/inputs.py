"""What is passed to the trainer beside data and configuration: of which kind it must be, and what comes with a model.

Loads no weights. Knows nothing of servers and run directories.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
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


def require_type(argument: str, found: Any, kinds: UnionType | type, expected: str, remedy: str) -> None:
    """Raises `TypeError`, with what is expected and what to write, if an argument is of none of these types."""
    if not isinstance(found, kinds):
        raise TypeError(f"`{argument}` must be {expected}, got {found!r} (`{type(found).__name__}`). {remedy}")


def check_model(model: Any) -> None:
    """Raises `TypeError` if it is neither a name nor a loaded model, `ValueError` if its folder holds none."""
    remedy = "Pass a path as `str(path)`, and a class as `Class.from_pretrained(...)`."
    require_type("model", model, str | nn.Module, "a hub id, a folder (both `str`) or a loaded model", remedy)
    if not isinstance(model, str) or Path(model, "config.json").is_file():
        return
    path, found, remedy = Path(model), "no config.json", "Correct the path."
    if (path / "adapter_config.json").is_file():
        found = "an adapter alone"
        remedy = "Pass the adapter loaded: `PeftModel.from_pretrained(base_model, folder, is_trainable=True)`."
    elif not path.exists():
        found = "nothing"
        if 0 < len(path.parts) <= 2 and not path.is_absolute() and not model.startswith((".", "~")):
            return  # a hub id
    raise ValueError(
        f"`model` is {model!r}, where there is {found}: expected a folder that `model.save_pretrained(folder)` has "
        f"written, or a hub id such as 'org/name'. {remedy}"
    )


def check_peft_config(peft_config: Any) -> None:
    """Raises `TypeError` if it is no configuration of PEFT, `ValueError` if it would be frozen, or begin by chance."""
    remedy = "Write `LoraConfig(r=16, target_modules='all-linear')`."
    require_type("peft_config", peft_config, PeftConfig | None, "a `PeftConfig`", remedy)
    if peft_config is not None and peft_config.inference_mode:
        raise ValueError(
            "`peft_config` has `inference_mode=True`, which freezes the adapter that is to be trained. "
            "Set `inference_mode=False`."
        )
    start = getattr(peft_config, "init_lora_weights", None)
    if str(start).startswith("pissa_niter"):
        raise ValueError(
            f"`init_lora_weights={start!r}` changes the base model by random numbers: a run that goes on, or merges "
            "the adapter, would have another base. Set it to 'pissa', which computes the same each time."
        )


def check_generation_metrics(compute: Any, eval_dataset: Any) -> None:
    """Raises `TypeError` if it cannot be called, `ValueError` if there is nothing to call it for."""
    remedy = "Pass one that takes prompts, references and generations and returns a dict of numbers."
    require_type("compute_generation_metrics", compute, Callable | None, "a function", remedy)
    if compute is not None and eval_dataset is None:
        raise ValueError(
            "`compute_generation_metrics` scores the answers to `eval_dataset`, and that is None. Pass an "
            "`eval_dataset`, or leave the metrics out."
        )


def check_generation_kwargs(generation_kwargs: dict[str, Any] | None) -> None:
    """Raises `ValueError` if transformers' generation would not know one of them, or cannot do it here."""
    if "stop_strings" in (generation_kwargs or {}):
        raise ValueError(
            "`generation_kwargs` has 'stop_strings', but in-process generation knows token ids alone. Leave it out, or "
            "use a vLLM server, whose `stop` does the same."
        )
    if unknown := sorted(GenerationConfig().update(**(generation_kwargs or {}))):
        raise ValueError(
            f"`generation_kwargs` has {unknown}, but in-process generation takes the fields of transformers' "
            "`GenerationConfig` only. Correct or remove them."
        )


def source_kwargs(args: SPINConfig) -> dict[str, Any]:
    """How whatever belongs to the base model is to be loaded: with which `revision` and `trust_remote_code`."""
    revision = (args.model_init_kwargs or {}).get("revision")
    return {"revision": revision, "trust_remote_code": args.trust_remote_code}


def model_config(model: str | PreTrainedModel, args: SPINConfig) -> PretrainedConfig:
    """Raises `ValueError` if it cannot be loaded."""
    if not isinstance(model, str):
        return model.config
    with _explained("configuration", model):
        return AutoConfig.from_pretrained(model, **source_kwargs(args))


def load_tokenizer(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None, model_name: str, args: SPINConfig
) -> PreTrainedTokenizerBase:
    """
    The tokenizer as passed, or the model's own. It pads with the end token if it has no other. Raises `TypeError` or
    `ValueError` if there is none, or it has no end token.
    """
    if processing_class is None:
        with _explained("tokenizer", model_name):
            processing_class = AutoTokenizer.from_pretrained(model_name, **source_kwargs(args))
    remedy = "Pass `AutoTokenizer.from_pretrained(...)`, or leave it out for the model's own."
    kinds = PreTrainedTokenizerBase | ProcessorMixin
    require_type("processing_class", processing_class, kinds, "a tokenizer", remedy)
    tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no end token, so no answer could ever end. Set `tokenizer.eos_token`, and pass the "
            "tokenizer as `processing_class`."
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
        config = model.generation_config
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
        instead = " or pass `processing_class`" if part == "tokenizer" else ""
        raise ValueError(
            f"The {part} of `model` {model!r} cannot be read; expected is what `save_pretrained` writes. Correct "
            f"`model` (of a hub id see its spelling, access rights and the network){instead}. The library says: {error}"
        ) from error
