"""Log-probs of given completions under the policy as it stands or as it was at first, sharded or not.

Knows nothing of servers and of iterations. Every process must call these functions together.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..data.batching import scoring_batches
from ..data.pair_dataset import PairDataset, pair_lengths
from ..processes.progress import progress_bar
from .finite import require_finite_truths, take_origins
from .sharding import initial_model


if TYPE_CHECKING:
    from trl import DPOTrainer


def score_pairs(
    trainer: "DPOTrainer", pairs: PairDataset, reference: AbstractContextManager[nn.Module] | None = None
) -> dict[str, np.ndarray]:
    """
    Log-probs of both sides of every pair under the reference.

    Args:
        trainer ([`~trl.DPOTrainer`]): Holds the policy.
        pairs ([`PairDataset`]): With the columns `prompt_ids`, `chosen_ids` and `rejected_ids`.
        reference (context manager, *optional*): Gives the reference, see below. By default the policy as it stands,
            which at the start of an iteration is the opponent.

    Returns:
        `dict` with the columns that DPOTrainer reads: `ref_chosen_logps` and `ref_rejected_logps`, each of shape
        `(len(pairs),)`, in nats, summed over the completion.
    """
    batches = _own_batches(trainer, pairs)
    loader = DataLoader(pairs, batch_sampler=batches, collate_fn=trainer.data_collator)
    device = trainer.accelerator.device
    logps = torch.zeros(2, len(pairs), device=device)  # (chosen and rejected, N)
    times_scored = torch.zeros(len(pairs), device=device)
    with _evaluating(trainer), reference or policy_as_reference(trainer) as model:
        for positions, batch in zip(batches, _progress(trainer, loader, "Scoring pairs"), strict=True):
            take_origins(batch)
            sides = trainer.compute_ref_log_probs(model, trainer._prepare_inputs(batch))
            logps[:, positions] = torch.stack(sides).float()
            times_scored[positions] = 1
    # Each pair was scored by one process; where the batches did not come out even, by several, alike.
    logps, times_scored = trainer.accelerator.reduce((logps, times_scored))
    chosen_logps, rejected_logps = (logps / times_scored).cpu().numpy()
    return {"ref_chosen_logps": chosen_logps, "ref_rejected_logps": rejected_logps}


def completion_logps(trainer: "DPOTrainer", rows: list[dict[str, Any]]) -> list[list[float]]:
    """
    Log-prob of every token of a few completions. Every process computes all of them.

    Args:
        rows (`list[dict]`): Each with `prompt_ids` and `completion_ids`.

    Returns:
        `list[list[float]]`: for each row one value per completion token, in nats.
    """
    with _evaluating(trainer):
        logps, mask = _per_token_logps(trainer, _collate_completions(trainer, rows))
    return [row_logps[row_mask].tolist() for row_logps, row_mask in zip(logps, mask, strict=True)]


def negative_log_likelihood(trainer: "DPOTrainer", dataset: Dataset) -> float:
    """
    Mean negative log-likelihood of the ground truths (`chosen_ids`), in nats per token.

    Raises:
        `FloatingPointError`: if that of a row is not finite.
    """
    rows = dataset.select_columns(["prompt_ids", "chosen_ids"]).rename_column("chosen_ids", "completion_ids")
    sums = []  # of each batch: log-prob, tokens

    def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return _collate_completions(trainer, examples)

    with (
        _evaluating(trainer),
        _loader(trainer, rows, trainer.args.per_device_eval_batch_size, collate) as loader,
    ):
        for batch in _progress(trainer, loader, "Scoring ground truths"):
            logps, mask = _per_token_logps(trainer, batch)
            batch_sums = torch.stack([logps.where(mask, 0).sum(dim=1), mask.sum(dim=1)], dim=1)  # (B, 2)
            sums.append(trainer.accelerator.gather_for_metrics(batch_sums).double().cpu())
    logps, num_tokens = torch.cat(sums).unbind(dim=1)
    require_finite_truths(dataset, logps)
    return (-logps.sum() / num_tokens.sum()).item()


def _own_batches(trainer: "DPOTrainer", pairs: Dataset) -> list[list[int]]:
    """
    Positions of the pairs in each batch that this process scores; as many batches for each process, since all of a
    sharded model go forward together.

    Unless `precompute_ref_batch_size` gives their number, a batch has twice the tokens, padding included, of the
    largest training batch. Without gradients that takes less memory: nothing is kept from one layer to the next, and
    the gradients and the activations of the layer that is at work take more than its activations alone.
    """
    args = trainer.args
    lengths = pair_lengths(pairs, args.max_length)
    if args.precompute_ref_batch_size is not None:
        batches = scoring_batches(lengths, max_pairs=args.precompute_ref_batch_size)
    else:
        batches = scoring_batches(lengths, max_tokens=2 * (2 * args.per_device_train_batch_size * int(lengths.max())))
    own = batches[args.process_index :: args.world_size]
    if len(batches) > (len(own) * args.world_size):  # the last round is not for all
        own.append(batches[-1])
    return [batch.tolist() for batch in own]


def _per_token_logps(trainer: "DPOTrainer", batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs (B, T - 1) of each next token, and where they belong to the completion."""
    batch = trainer._prepare_inputs(batch)
    with torch.no_grad(), trainer.accelerator.autocast():
        outputs = trainer.model_wrapped(**batch, use_cache=False, fused_lm_head=True)
    mask = batch["labels"][:, 1:] != -100
    return outputs.log_probs[:, -mask.size(1) :].float(), mask


def _collate_completions(trainer: "DPOTrainer", rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    examples = [
        {
            "input_ids": (row["prompt_ids"] + row["completion_ids"])[: trainer.args.max_length],
            "labels": ([-100] * len(row["prompt_ids"]) + row["completion_ids"])[: trainer.args.max_length],
        }
        for row in rows
    ]
    return DataCollatorForLanguageModeling(trainer._tokenizer.pad_token_id)(examples)


@contextmanager
def policy_as_reference(trainer: "DPOTrainer") -> Iterator[nn.Module]:
    """For the time of scoring the policy *is* the reference: DPOTrainer then neither looks for another nor switches
    the adapter off."""
    trainer.ref_model = trainer.model_wrapped
    try:
        yield trainer.model_wrapped
    finally:
        trainer.ref_model = None


def initial_policy_as_reference(trainer: "DPOTrainer", path: str) -> AbstractContextManager[nn.Module]:
    """
    The policy before training. With an adapter DPOTrainer knows it itself: without the adapter, or with a copy of the
    one that was passed trained. Otherwise it is loaded from `path` for the time of scoring.
    """
    if is_peft_model(trainer.model):
        return nullcontext(trainer.model_wrapped)
    return initial_model(trainer, path)


@contextmanager
def _evaluating(trainer: "DPOTrainer") -> Iterator[None]:
    was_training = trainer.model.training
    trainer.model_wrapped.eval()
    try:
        with disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs):
            yield
    finally:
        trainer.model_wrapped.train(was_training)


@contextmanager
def _loader(trainer: "DPOTrainer", dataset: Dataset, batch_size: int, collate=None) -> Iterator[DataLoader]:
    loader = trainer.accelerator.prepare(
        DataLoader(dataset, batch_size=batch_size, collate_fn=collate or trainer.data_collator, shuffle=False)
    )
    try:
        yield loader
    finally:
        forget_loader(trainer, loader)


def forget_loader(trainer: "DPOTrainer", loader: DataLoader) -> None:
    """Accelerate remembers every loader it ever prepared, and with it the dataset; let go of this one."""
    kept = [known for known in trainer.accelerator._dataloaders if known is not loader]
    trainer.accelerator._dataloaders[:] = kept


def _progress(trainer: "DPOTrainer", loader: DataLoader, description: str) -> tqdm:
    return progress_bar(loader, desc=description, disable=not trainer.is_world_process_zero())
