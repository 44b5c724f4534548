"""The trainer's loss without a language model."""

from types import SimpleNamespace

import torch

from spin_trl import SPINTrainer


class LossProbe:
    """SPINTrainer's loss of given log-probs: its `model` answers with a table instead of a language model."""

    def __init__(self, trainer: SPINTrainer):
        self.trainer = trainer
        self.num_forwards = 0

    def __call__(
        self, loss_types, logps, ref_logps, beta=0.1, loss_weights=None, space_mu=1.0, label_smoothing=0.0
    ) -> torch.Tensor:
        """
        Args:
            logps, ref_logps: Of the chosen and of the rejected side, two tensors of shape (B,) each.
        """
        trainer = self.trainer
        trainer.beta, trainer.label_smoothing = beta, label_smoothing
        trainer.args.space_mu = space_mu
        trainer.loss_types = list(loss_types)
        trainer.loss_weights = loss_weights or [1.0] * len(loss_types)
        trainer._split_losses()
        log_probs = torch.cat(logps).unsqueeze(1)  # one token for each completion, chosen ones first

        def model(**kwargs):
            self.num_forwards += 1
            is_top1 = torch.ones_like(log_probs, dtype=torch.bool)
            zeros = torch.zeros_like(log_probs)
            return SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=is_top1)

        input_ids = torch.ones(len(log_probs), 2, dtype=torch.long)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": input_ids,
            "completion_mask": torch.tensor([[0, 1]]).expand(len(log_probs), 2),
            "ref_chosen_logps": ref_logps[0],
            "ref_rejected_logps": ref_logps[1],
        }
        return trainer._compute_loss(model, inputs, return_outputs=False)
