"""`Policy`: everything that self-play asks of the weights in training. Knows nothing of servers and iterations."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import load_peft_weights, set_peft_model_state_dict
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..data.batching import scoring_batches
from ..data.columns import list_lengths, numbers
from ..data.pair_dataset import PairDataset, pair_lengths
from ..processes.progress import progress_bar
from ..processes.ranks import on_every_process, on_main_process
from ..run_directory.whole_files import write_whole
from .finite import require_finite, take_origins
from .merging import fold_scaling, merge_into_saved, save_base, save_merged
from .offload import training_tensors
from .published_form import Publication
from .sharding import initial_model, whole_model


if TYPE_CHECKING:
    from trl import DPOTrainer


class Policy:
    """
    Saves, loads, scores and lends the policy, sharded or not. Every process calls each method together.

    Log-probs are in nats.

    Args:
        trainer ([`~trl.DPOTrainer`]): Holds model, optimizer and processes.
        publication ([`Publication`]): In which form an opponent is saved.
    """

    def __init__(self, trainer: "DPOTrainer", publication: Publication):
        self._trainer = trainer
        self._publication = publication

    # On disk

    def save(self, directory: str) -> None:
        """Save the policy as it stands, in the form to publish, gathered if it is sharded."""
        trainer = self._trainer
        if self._publication.kind == "merged":
            if trainer.args.should_save:
                save_merged(trainer.accelerator.unwrap_model(trainer.model), directory)
                trainer.processing_class.save_pretrained(directory)
            return
        trainer.save_model(directory, _internal_call=True)
        if self._publication.folds_scaling and trainer.args.should_save:
            fold_scaling(directory)

    def save_merged(self, base_model: str, directory: Path) -> None:
        """
        Save the policy with its adapter merged into the base model as that was saved, to be loaded without PEFT. What
        lies in `directory` is replaced, in one step.

        Raises:
            [`DiskError`]: if the disk does not take it.
        """
        trainer = self._trainer

        def merge() -> None:
            merged = merge_into_saved(base_model, adapter, trainer.args)
            parts = merged, trainer.processing_class
            write_whole(directory, lambda folder: [part.save_pretrained(folder) for part in parts])

        with TemporaryDirectory() as adapter:
            on_every_process(lambda: trainer.save_model(adapter, _internal_call=True))
            on_main_process(merge)
        quantised = " without its quantisation" if getattr(trainer.model, "is_quantized", False) else ""
        trainer.accelerator.print(f"Saved the adapter merged into {base_model}{quantised} to {directory}")

    def save_base(self, directory: Path) -> None:
        """Save the base model of an adapter, in plain numbers, with its tokenizer. Called on the main process."""
        save_base(self._trainer.model, str(directory))
        self._trainer.processing_class.save_pretrained(directory)

    def load(self, path: Path) -> None:
        """Make the policy what was saved at `path`, for good. Not for a policy whose weights are sharded."""
        if not is_peft_model(self._trainer.model):
            self._trainer._load_from_checkpoint(str(path))
            return
        # Not `load_adapter`, which Trainer calls: it would change the adapter's precision.
        weights = load_peft_weights(str(path), device="cpu")
        set_peft_model_state_dict(self._trainer.model, weights, adapter_name="default")

    @contextmanager
    def lent_to(self, path: Path) -> Iterator[None]:
        """
        The policy is the opponent saved at `path` for a while, and itself again afterwards, bit for bit. Meanwhile its
        own numbers wait in host memory; tensors stay the ones that the optimizer knows.
        """
        trained = [parameter for parameter in self._trainer.model.parameters() if parameter.requires_grad]
        own = [parameter.detach().to("cpu", copy=True) for parameter in trained]
        try:
            on_every_process(lambda: self.load(path))
            yield
        finally:
            with torch.no_grad():
                for parameter, numbers in zip(trained, own, strict=True):
                    parameter.copy_(numbers)

    # In memory

    @property
    def precision(self) -> str:
        """What it computes in: "float32", "bfloat16" or "float16"."""
        args = self._trainer.args
        return "bfloat16" if args.bf16 else "float16" if args.fp16 else str(self._trainer.model.dtype).split(".")[1]

    @contextmanager
    def whole(self) -> Iterator[PreTrainedModel]:
        """The policy, unwrapped and gathered, to generate with."""
        trainer = self._trainer
        gathered = whole_model(trainer.model_wrapped, trainer.accelerator, trainer.args.gradient_checkpointing_kwargs)
        with self._evaluating(), gathered as model, trainer.accelerator.autocast():
            yield model

    def training_tensors(self) -> Iterator[torch.Tensor]:
        """What training keeps on the device."""
        trainer = self._trainer
        return training_tensors(trainer.model, trainer.optimizer, trainer.accelerator.device)

    # Log-probs

    def score(self, pairs: PairDataset) -> dict[str, np.ndarray]:
        """
        Log-probs of both sides of every pair, under the policy as it stands.

        Returns:
            `dict` with the columns that DPOTrainer reads: `ref_chosen_logps` and `ref_rejected_logps`, each of shape
            `(len(pairs),)`, summed over the completion.
        """
        self._trainer.ref_model = self._trainer.model_wrapped  # else DPOTrainer would switch the adapter off
        try:
            return self._score(pairs, self._trainer.model_wrapped)
        finally:
            self._trainer.ref_model = None

    def score_initial(self, pairs: PairDataset, path: str) -> dict[str, np.ndarray]:
        """
        As [`score`], under the policy before training. With an adapter DPOTrainer knows it itself: without the adapter,
        or with a copy of the one that was passed trained. Otherwise it is loaded from `path` for as long as it scores.
        """
        trainer = self._trainer
        if is_peft_model(trainer.model):
            return self._score(pairs, trainer.model_wrapped)
        with initial_model(path, trainer.model, trainer.args, trainer.accelerator) as model:
            return self._score(pairs, model)

    def completion_logps(self, rows: list[dict[str, Any]]) -> list[list[float]]:
        """
        Log-prob of every completion token of a few rows, each with `prompt_ids` and `completion_ids`. Every process
        computes all of them.
        """
        with self._evaluating():
            logps, mask = self._token_logps(self._collate_completions(rows))
        return [row_logps[row_mask].tolist() for row_logps, row_mask in zip(logps, mask, strict=True)]

    def nll(self, dataset: Dataset) -> float:
        """
        Mean negative log-likelihood of the ground truths, `chosen_ids`, per token.

        Raises:
            `FloatingPointError`: if that of a row is not finite.
        """
        rows = dataset.select_columns(["prompt_ids", "chosen_ids"]).rename_column("chosen_ids", "completion_ids")
        lengths = list_lengths(dataset, "prompt_ids") + list_lengths(dataset, "chosen_ids")
        batches = scoring_batches(lengths, max_pairs=self._trainer.args.per_device_eval_batch_size)

        def compute(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            logps, mask = self._token_logps(batch)
            return logps.sum(dim=1), mask.sum(dim=1)

        logps, num_tokens = self._by_row(rows, batches, self._collate_completions, compute, "Scoring ground truths")
        truths = {"chosen": logps.numpy()}
        source_rows = numbers(dataset, "source_row")
        require_finite("The policy cannot score the ground truths.", truths, source_rows.item, "eval_dataset")
        return (-logps.sum() / num_tokens.sum()).item()

    def _score(self, pairs: PairDataset, model: nn.Module) -> dict[str, np.ndarray]:
        trainer, args = self._trainer, self._trainer.args
        lengths = pair_lengths(pairs, args.max_length)
        if args.precompute_ref_batch_size is not None:
            batches = scoring_batches(lengths, max_pairs=args.precompute_ref_batch_size)
        else:  # twice the largest training batch, which takes less memory without gradients
            max_tokens = 2 * (2 * args.per_device_train_batch_size * int(lengths.max()))
            batches = scoring_batches(lengths, max_tokens=max_tokens)

        def compute(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
            take_origins(batch)
            return trainer.compute_ref_log_probs(model, trainer._prepare_inputs(batch))

        logps = self._by_row(pairs, batches, trainer.data_collator, compute, "Scoring pairs").float().numpy()
        return dict(zip(("ref_chosen_logps", "ref_rejected_logps"), logps, strict=True))

    def _by_row(
        self,
        rows: Dataset | PairDataset,
        batches: list[np.ndarray],
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
        compute: Callable[[dict[str, Any]], tuple[torch.Tensor, torch.Tensor]],
        description: str,
    ) -> torch.Tensor:
        """Two numbers for each row, in double precision (2, N). The processes share the batches."""
        trainer, args = self._trainer, self._trainer.args
        own = batches[args.process_index :: args.world_size]
        # The last round is not for all, but all of a sharded model go forward together.
        rounds = own if len(own) * args.world_size >= len(batches) else [*own, batches[-1]]
        loader = DataLoader(rows, batch_sampler=[batch.tolist() for batch in rounds], collate_fn=collate)
        values = torch.zeros(2, len(rows), device=trainer.accelerator.device)
        with self._evaluating():
            shown = progress_bar(loader, desc=description, disable=not trainer.is_world_process_zero())
            for number, batch in enumerate(shown):
                computed = torch.stack(compute(batch)).float()
                if number < len(own):
                    values[:, own[number]] = computed
        return trainer.accelerator.reduce(values).cpu().double()

    def _token_logps(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs (B, T - 1) of each next token, 0 in the prompt, and where they belong to the completion."""
        batch = self._trainer._prepare_inputs(batch)
        with torch.no_grad(), self._trainer.accelerator.autocast():
            outputs = self._trainer.model_wrapped(**batch, use_cache=False, fused_lm_head=True)
        mask = batch["labels"][:, 1:] != -100
        return outputs.log_probs[:, -mask.size(1) :].float(), mask  # prompt learning puts virtual tokens before them

    def _collate_completions(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        max_length = self._trainer.args.max_length
        examples = [
            {
                "input_ids": (row["prompt_ids"] + row["completion_ids"])[:max_length],
                "labels": ([-100] * len(row["prompt_ids"]) + row["completion_ids"])[:max_length],
            }
            for row in rows
        ]
        return DataCollatorForLanguageModeling(self._trainer._tokenizer.pad_token_id)(examples)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self._trainer.model.training
        self._trainer.model_wrapped.eval()
        try:
            yield
        finally:
            self._trainer.model_wrapped.train(was_training)
