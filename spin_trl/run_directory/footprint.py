"""How many bytes a run will write, told before it begins. Knows nothing of how they are written.

The estimate assumes that

- answers are as long as the ground truths are on average, and no pair is dropped as identical;
- the optimizer keeps two moments for each trained number, in its own precision (AdamW). DeepSpeed and FSDP in mixed
  precision keep a float32 copy besides; SGD, Adafactor and 8-bit optimizers keep less;
- nothing else writes to the disk, and it does not compress.

The lower bound counts what a run that plays to its end certainly holds at some moment: the weights of its opponents
and of the checkpoints that it keeps. Neither counts the final model that the user saves.
"""

import copy
import errno
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase
from transformers.integrations import deepspeed
from transformers.trainer_utils import SaveStrategy

from ..data.columns import list_lengths, num_bytes_of
from ..objectives.settings import needs_initial_answers
from ..spin_config import SPINConfig
from .disk import DiskError, free_bytes, readable


if TYPE_CHECKING:
    from peft import PeftConfig

# Bytes of an answer's token id: in the pairs' Arrow files, and in the completions' compressed Parquet files.
_ANSWER_TOKEN_BYTES = {"pairs": 4, "completions": 2}
_PAIR_BYTES = 36  # iteration, row, source row, sample, two log-probs, an offset
_COMPLETION_BYTES = 10  # row, sample, finish reason, offset
_FILE_BYTES = 2048  # a part's own header and footer
_CHECKPOINT_BYTES = 32_768  # its random states, arguments and log
_CLOSE = 0.9  # of the free space


@dataclass(frozen=True)
class Weights:
    """
    What the policy's numbers take on disk.

    Args:
        saved (`int`): Bytes of one copy: the adapter's, or the model's.
        trained (`int`): Bytes of the numbers that are trained.
        tokenizer (`int`): Bytes of the tokenizer that lies with every copy.
        published (`int`, *optional*): Bytes of an opponent, where that is not what is saved: the merged model's.
        base (`int`): Bytes of the base model.
    """

    saved: int
    trained: int
    tokenizer: int = 0
    published: int | None = None
    base: int = 0


@dataclass(frozen=True)
class Footprint:
    """
    Bytes that a run writes, at the moment when it holds the most.

    Args:
        completions (`int`): Answers of all iterations, those to the evaluation prompts included.
        data (`int`): What is trained on, prompts and ground truths.
        pairs (`int`): What the iterations add to that.
        opponents (`int`): Saved opponents.
        checkpoints (`int`): Trainer's checkpoints that lie there at once.
        lower_bound (`int`): What a run that plays to its end needs at the least.
    """

    completions: int
    data: int
    pairs: int
    opponents: int
    checkpoints: int
    lower_bound: int

    @property
    def total(self) -> int:
        return self.completions + self.data + self.pairs + self.opponents + self.checkpoints

    def __str__(self) -> str:
        parts = ("opponents", "checkpoints", "data", "pairs", "completions")
        return f"about {readable(self.total)} ({', '.join(f'{p} {readable(getattr(self, p))}' for p in parts)})"


def estimate_footprint(
    args: SPINConfig,
    weights: Weights,
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
    saves_opponents: bool,
    base_is_opponent: bool,
    writes_base: bool = False,
    preferences: Dataset | None = None,
) -> Footprint:
    """
    Args:
        args ([`SPINConfig`]): With `max_completion_length` filled in.
        weights ([`Weights`]): The policy's.
        train_dataset, eval_dataset ([`~datasets.Dataset`]): With `prompt_ids` and `chosen_ids`.
        saves_opponents (`bool`): Whether the sampler reads opponents from disk.
        base_is_opponent (`bool`): Whether the first opponent need not be saved.
        writes_base (`bool`): Whether a base model is written for the server.
        preferences ([`~datasets.Dataset`], *optional*): Token ids of the pairs that join in every iteration.
    """
    iterations = range(args.num_iterations)
    chosen_tokens = _num_tokens(train_dataset)
    answer_tokens = min(chosen_tokens, args.max_completion_length * len(train_dataset))
    num_answers = len(train_dataset) * args.num_generations
    completions = args.num_iterations * (
        answer_tokens * args.num_generations * _ANSWER_TOKEN_BYTES["completions"]
        + num_answers * _COMPLETION_BYTES
        + _num_parts(train_dataset, args) * _FILE_BYTES
    )
    if eval_dataset is not None:
        tokens = min(_num_tokens(eval_dataset), args.max_completion_length * len(eval_dataset))
        completions += (args.num_iterations + 1) * (
            tokens * _ANSWER_TOKEN_BYTES["completions"]
            + len(eval_dataset) * _COMPLETION_BYTES
            + _num_parts(eval_dataset, args) * _FILE_BYTES
        )
    own_sides = args.max_pairs_per_prompt * (1 if args.pairing == "ground_truth" else 2)
    own_pairs = len(train_dataset) * args.max_pairs_per_prompt * _PAIR_BYTES
    own_pairs += own_sides * answer_tokens * _ANSWER_TOKEN_BYTES["pairs"]
    pairs = sum(own_pairs * (1 + min(i, args.num_history_iterations)) + _FILE_BYTES for i in iterations)
    if needs_initial_answers(args.loss_type, vars(args)):
        pairs += own_pairs
    preference_bytes = 0 if preferences is None else num_bytes_of(preferences)
    pairs += len(iterations) * preference_bytes  # less, since the prompts are not repeated
    num_opponents = _num_opponents(args, saves_opponents, base_is_opponent, eval_dataset is not None)
    num_checkpoints = _num_checkpoints(args, len(train_dataset) * args.max_pairs_per_prompt)
    opponent = weights.saved if weights.published is None else weights.published
    written_base = weights.base if writes_base else 0
    checkpoint = weights.saved + weights.tokenizer + _CHECKPOINT_BYTES
    if not args.save_only_model:
        checkpoint += 2 * weights.trained
    return Footprint(
        completions=completions,
        data=num_bytes_of(train_dataset) + preference_bytes + _FILE_BYTES,
        pairs=pairs,
        opponents=num_opponents * (opponent + weights.tokenizer) + written_base,
        checkpoints=num_checkpoints * checkpoint,
        lower_bound=written_base
        + (0 if args.max_steps > 0 else opponent * num_opponents + weights.saved * _num_kept(args)),
    )


def check_footprint(
    footprint: Footprint, directory: Path, log: Callable[[str], Any], warn: Callable[[str], Any]
) -> None:
    """
    Log what a run will write beside what is free, and warn if that is close.

    Args:
        directory (`Path`): The run directory. What lies there already counts as written, or as deleted first.
        log, warn (`Callable[[str], None]`): Where to say so.

    Raises:
        [`DiskError`]: if even the least that the run writes does not fit.
    """
    free, present = free_bytes(directory), _size_of_run(directory)
    there = f", of which {readable(present)} lie there already" if present else ""
    message = f"The run writes {footprint}{there} to {directory}, where {readable(free)} are free."
    if footprint.lower_bound - present > free:
        raise DiskError(
            errno.ENOSPC,
            f"{message} Its opponents and checkpoints alone need {readable(footprint.lower_bound)}. Free space, choose "
            "another `output_dir`, set `save_total_limit`, or train an adapter instead of all weights.",
        )
    if footprint.total - present > _CLOSE * free:
        warn(f"{message} That may not be enough: free space, or set `save_total_limit` or `save_only_model`.")
    else:
        log(message)


def size_of_weights(model: nn.Module) -> int:
    """Bytes of what `save_model` writes of a model: of its adapter, or else of all weights, shared ones once."""
    is_adapter = bool(getattr(model, "peft_config", None))
    return _num_bytes(p for p in model.parameters() if p.requires_grad or not is_adapter)


def size_of_base(model: nn.Module) -> int:
    """Bytes of the model below an adapter, which are those of the model that the adapter is merged into."""
    return sum(_num_elements(p) for p in model.parameters() if not p.requires_grad) * _element_size(model)


def size_of_checkpoint(model: nn.Module, args: SPINConfig) -> int:
    """Bytes of a checkpoint: what `save_model` writes and, unless it is left out, two moments for what is trained."""
    moments = 0 if args.save_only_model else 2 * _num_bytes(p for p in model.parameters() if p.requires_grad)
    return size_of_weights(model) + moments


def weights_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase, merged: bool = False) -> Weights:
    """Of a model that is loaded, or on the `meta` device. `merged`: its opponents are published as full weights."""
    trained = _num_bytes(p for p in model.parameters() if p.requires_grad)
    base = size_of_base(model)
    return Weights(
        saved=size_of_weights(model),
        trained=trained,
        tokenizer=_size_of_tokenizer(tokenizer),
        published=base if merged else None,
        base=base,
    )


def empty_policy(config: PretrainedConfig, args: SPINConfig, peft_config: "PeftConfig | None") -> nn.Module:
    """The policy without its numbers: shapes and types alone, on the `meta` device."""
    dtype = (args.model_init_kwargs or {}).get("dtype") or "float32"  # DPOTrainer's default
    dtype = getattr(config, "dtype", None) or "float32" if dtype == "auto" else dtype
    with of_this_process_alone(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=args.trust_remote_code)
        model = model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        if peft_config is not None:
            from peft import get_peft_model

            peft_config = copy.deepcopy(peft_config)
            if hasattr(peft_config, "init_lora_weights"):
                peft_config.init_lora_weights = False  # others look at numbers that are not there
            model = get_peft_model(model, peft_config)
    return model


@contextmanager
def of_this_process_alone() -> Iterator[None]:
    """Under ZeRO-3 transformers spreads every model that is made over all processes, and waits for them to make it."""
    reference = deepspeed._hf_deepspeed_config_weak_ref
    config = None if reference is None else reference()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def _num_bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in parameters)


def _num_elements(parameter: nn.Parameter) -> int:
    quantized_shape = getattr(getattr(parameter, "quant_state", None), "shape", None)  # two of 4 bits in a byte
    return getattr(parameter, "ds_numel", parameter.numel()) if quantized_shape is None else quantized_shape.numel()


def _element_size(model: nn.Module) -> int:
    """Bytes of a number in the model's own precision."""
    dtype = getattr(model, "dtype", None) or next(model.parameters()).dtype
    return torch.empty(0, dtype=dtype).element_size()


def _num_tokens(dataset: Dataset) -> int:
    """Token ids of all ground truths."""
    return int(list_lengths(dataset, "chosen_ids").sum())


def _num_parts(dataset: Dataset, args: SPINConfig) -> int:
    return -(-len(dataset) // args.generation_part_size)


def _num_opponents(args: SPINConfig, saves_opponents: bool, base_is_opponent: bool, evaluates: bool) -> int:
    if args.takes_back_policies:
        return args.num_iterations + 1
    if not saves_opponents:
        if args.num_opponents > 1:  # for the policy to play them again
            return args.num_iterations + evaluates
        return int(args.initial_reference is not None and not base_is_opponent)
    return args.num_iterations + evaluates - base_is_opponent


def _num_checkpoints(args: SPINConfig, num_pairs: int) -> int:
    """Checkpoints that lie there at once: a new one is whole before the oldest goes."""
    if args.save_strategy == SaveStrategy.NO:
        return 0
    num_saved = args.num_iterations
    if args.save_strategy == SaveStrategy.EPOCH:
        num_saved = args.num_iterations * args.epochs_per_iteration
    elif args.save_strategy == SaveStrategy.STEPS and args.save_steps >= 1:
        per_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        for iteration in range(args.num_iterations):
            steps = num_pairs * (1 + min(iteration, args.num_history_iterations)) // per_step
            num_saved += int(steps * args.epochs_per_iteration // args.save_steps)
    limit = args.save_total_limit
    return min(num_saved, limit + 1) if limit is not None and limit > 0 else num_saved


def _num_kept(args: SPINConfig) -> int:
    """Checkpoints that a run certainly keeps at once: every iteration ends in one."""
    limit = args.save_total_limit
    kept = args.num_iterations if limit is None or limit <= 0 else min(args.num_iterations, limit)
    return 0 if args.save_strategy == SaveStrategy.NO else kept


def _size_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> int:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return len(backend.to_str(pretty=True).encode()) if backend is not None else 0


def _size_of_run(directory: Path) -> int:
    """Bytes of the data, iterations and checkpoints that lie in a run directory."""
    found = [path for name in ("iteration-*", "checkpoint-*", "*_data") for path in directory.glob(f"{name}/**/*")]
    return sum(path.stat().st_size for path in found if path.is_file() and not path.is_symlink())
