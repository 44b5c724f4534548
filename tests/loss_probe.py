"""The trainer's loss without a language model."""

from types import SimpleNamespace

import torch
from accelerate import Accelerator
from accelerate.state import is_initialized

from spin_trl import SPINTrainer
from spin_trl.objectives.own_losses import OwnLosses


class LossProbe:
    """SPINTrainer's loss of given log-probs: its `model` answers with a table instead of a language model."""

    def __init__(self, trainer: SPINTrainer):
        self.trainer = trainer
        self.num_forwards = 0

    def __call__(
        self, loss_types, logps, ref_logps, beta=0.1, loss_weights=None, label_smoothing=0.0, **fields
    ) -> torch.Tensor:
        """
        Args:
            logps: Of the chosen and of the rejected side, perhaps of the initial answers too, tensors of shape (B,).
            ref_logps: Of the first two of these.
            **fields: `space_mu`, `t_spin_alpha`, ...; what is not given has its default.
        """
        trainer = self.trainer
        if not is_initialized():  # another test's configuration has reset what all accelerators share
            Accelerator(cpu=True)
        trainer.beta, trainer.label_smoothing = beta, label_smoothing
        weights = loss_weights or [1.0] * len(loss_types)
        own = OwnLosses(loss_types, weights, vars(trainer.args) | fields, trainer.accelerator)
        trainer.own_losses, trainer.loss_types, trainer.loss_weights = own, own.trl_loss_types, own.trl_loss_weights
        log_probs = torch.cat(logps).unsqueeze(1)  # one token for each completion, chosen ones first
        num_pairs = len(logps[0])

        def model(**kwargs):
            self.num_forwards += 1
            assert len(kwargs["input_ids"]) == len(log_probs)
            is_top1 = torch.ones_like(log_probs, dtype=torch.bool)
            zeros = torch.zeros_like(log_probs)
            return SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=is_top1)

        input_ids = torch.ones(2 * num_pairs, 2, dtype=torch.long)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": input_ids,
            "completion_mask": torch.tensor([[0, 1]]).expand(2 * num_pairs, 2),
            "ref_chosen_logps": ref_logps[0],
            "ref_rejected_logps": ref_logps[1],
        }
        if len(logps) == 3:
            names = ("input_ids", "attention_mask", "labels")
            inputs["initial"] = dict.fromkeys(names, torch.ones(num_pairs, 2, dtype=torch.long))
        return trainer.compute_loss(model, inputs)
