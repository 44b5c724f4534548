"""`Policy`: everything that self-play asks of the weights in training. Knows nothing of servers and iterations."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import PreTrainedModel

from ..data.pair_dataset import PairDataset
from ..processes.ranks import on_every_process, on_main_process
from ..run_directory.whole_files import remove, temporary_path, write_directory
from .adapters import precisions_of, restore_precisions
from .log_probs import completion_logps, initial_policy_as_reference, negative_log_likelihood, score_pairs
from .merging import fold_scaling, merge_into_saved, save_merged
from .offload import training_tensors
from .published_form import Publication
from .sharding import whole_policy
from .sizes import size_of_base, size_of_weights


if TYPE_CHECKING:
    from trl import DPOTrainer


class Policy:
    """
    Saves, loads, scores and lends the policy, sharded or not. Every process calls each method together.

    Args:
        trainer ([`~trl.DPOTrainer`]): Holds model, optimizer and processes.
        publication ([`Publication`]): In which form an opponent is saved.
    """

    def __init__(self, trainer: "DPOTrainer", publication: Publication):
        self._trainer = trainer
        self._publication = publication

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
        Save the policy with its adapter merged into the base model as that was saved, to be loaded without PEFT.

        Args:
            base_model (`str`): Folder or hub id of the base.
            directory (`Path`): Where to. What lies there is replaced, in one step.

        Raises:
            [`DiskError`]: if the disk does not take it.
        """
        trainer = self._trainer
        adapter = temporary_path(directory.with_name(f"{directory.name}-adapter"), shared=True)

        def merge() -> None:
            merged = merge_into_saved(base_model, adapter, trainer.args)

            def write(temporary: Path) -> None:
                merged.save_pretrained(temporary)
                trainer.processing_class.save_pretrained(temporary)

            write_directory(directory, write, num_bytes=size_of_weights(merged))

        on_every_process(lambda: trainer.save_model(str(adapter), _internal_call=True))
        try:
            on_main_process(merge)
        finally:
            if trainer.is_world_process_zero():
                remove(adapter)
        quantised = " without its quantisation" if getattr(trainer.model, "is_quantized", False) else ""
        trainer.accelerator.print(f"Saved the adapter merged into {base_model}{quantised} to {directory}")

    @property
    def num_bytes(self) -> int:
        """Size of what [`save`] writes."""
        model = self._trainer.model
        return size_of_base(model) if self._publication.kind == "merged" else size_of_weights(model)

    def load(self, path: Path) -> None:
        """Make the policy what was saved at `path`, for good."""
        precisions = precisions_of(self._trainer.model)
        precisions = precisions_of(self._trainer.model)
        self._trainer._load_from_checkpoint(str(path))
        restore_precisions(self._trainer.model, precisions)
        restore_precisions(self._trainer.model, precisions)

    @contextmanager
    def lent_to(self, path: Path) -> Iterator[None]:
        """
        The policy is an earlier opponent for a while, and itself again afterwards, bit for bit.

        What is trained waits in host memory meanwhile. Tensors stay the ones that the optimizer knows: only their
        numbers are exchanged, and nobody is told.

        Args:
            path (`Path`): Where the opponent was saved.
        """
        trained = [parameter for parameter in self._trainer.model.parameters() if parameter.requires_grad]
        own = [parameter.detach().to("cpu", copy=True) for parameter in trained]
        try:
            on_every_process(lambda: self._load_numbers(path))
            yield
        finally:
            with torch.no_grad():
                for parameter, numbers in zip(trained, own, strict=True):
                    parameter.copy_(numbers)

    def whole(self) -> AbstractContextManager[PreTrainedModel]:
        """The policy, unwrapped and gathered, to generate with."""
        return whole_policy(self._trainer)

    def score(self, pairs: PairDataset) -> dict[str, np.ndarray]:
        """Log-probs of both sides of every pair; see [`score_pairs`]."""
        return score_pairs(self._trainer, pairs)

    def score_initial(self, pairs: PairDataset, path: str) -> dict[str, np.ndarray]:
        """As [`score`], under the policy before training, which without an adapter is loaded from `path`."""
        return score_pairs(self._trainer, pairs, initial_policy_as_reference(self._trainer, path))

    def completion_logps(self, rows: list[dict[str, Any]]) -> list[list[float]]:
        """Log-prob of every token of a few completions; see [`completion_logps`]."""
        return completion_logps(self._trainer, rows)

    def nll(self, dataset: Dataset) -> float:
        """Mean negative log-likelihood of the ground truths, in nats per token; see [`negative_log_likelihood`]."""
        return negative_log_likelihood(self._trainer, dataset)

    def training_tensors(self) -> Iterator[torch.Tensor]:
        """What training keeps on the device; see [`training_tensors`]."""
        trainer = self._trainer
        return training_tensors(trainer.model, trainer.optimizer, trainer.accelerator.device)

    def _load_numbers(self, path: Path) -> None:
        if not is_peft_model(self._trainer.model):
            self.load(path)
            return
        from peft import load_peft_weights, set_peft_model_state_dict

        # Not `load_adapter`, which Trainer calls: it would change the adapter's precision.
        set_peft_model_state_dict(
            self._trainer.model, load_peft_weights(str(path), device="cpu"), adapter_name="default"
        )
