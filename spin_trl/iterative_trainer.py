"""`IterativeTrainer`: a DPOTrainer whose dataset, schedule and optimizer begin anew every few epochs, resumably.

Knows nothing of where the pairs come from.
"""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers.trainer import SCHEDULER_NAME
from trl import DPOTrainer

from .data.batching import epoch_order
from .data.pair_dataset import PairDataset, pair_lengths
from .policy.adapters import precisions_of, restore_precisions
from .policy.optimizer import set_learning_rate
from .run_directory.checkpoints import Place, saving_checkpoints
from .run_directory.run import Run
from .spin_config import SPINConfig


class IterativeTrainer(DPOTrainer):
    """
    Differs from [`~trl.DPOTrainer`] in the training loop: `begin_iteration` gives each iteration its own pairs, however
    many, with the schedule and the optimizer begun anew.

    Args:
        expected_pairs (`Callable[[int], int]`): About how many pairs an iteration trains on.
        *other, **more: As for [`~trl.DPOTrainer`].
    """

    def __init__(self, *other, expected_pairs: Callable[[int], int], **more: Any):
        self._expected_pairs = expected_pairs
        self.run = Run()
        self.epoch = 0
        super().__init__(*other, **more)
        self._precisions = precisions_of(self.model)
        # Groups of an optimizer that was passed have rates of their own; ours all have `args.learning_rate`.
        self._own_rates = None if self.optimizer is None else [group["lr"] for group in self.optimizer.param_groups]
        self._keeps_scheduler = self.lr_scheduler is not None

    # DPOTrainer tokenises the dataset and scores its pairs at the start. Here there are no pairs before an iteration.

    def _prepare_dataset(self, dataset: Dataset, *args, **kwargs) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *args, **kwargs) -> Dataset:
        return dataset

    def evaluate(self, *args, **kwargs) -> None:
        """Refused: `train()` evaluates every opponent and the final policy."""
        raise NotImplementedError(
            "`evaluate()` is not possible outside of `train()`, whose opponents answer the evaluation prompts. Pass "
            "`eval_dataset` to the trainer: `train()` evaluates the start, every iteration and the final policy, and "
            "`trainer.state.log_history` has the scores, as `eval_nll` and so on."
        )

    def log_beside_steps(self, metrics: dict[str, float]) -> None:
        """Log values of an iteration, without those of training steps that have not been logged yet."""
        is_step_to_log = self.control.should_log
        super(DPOTrainer, self).log(dict(metrics))
        self.control.should_log = is_step_to_log  # any log would count as that of the step

    # Iterations of different lengths

    def begin_iteration(self, iteration: int, pairs: PairDataset) -> None:
        """
        Train on these pairs from now on, with the schedule and the optimizer begun anew, or, where a resumed run
        stopped within this iteration, as they stood. The pairs are scored by the iteration's opponent.
        """
        start = self.run.start
        num_steps_done = start.num_steps if iteration == start.iteration else 0
        self.train_dataset = pairs
        self.beta = self.args.beta_at(iteration)
        self.run.place = place = Place(
            start.place.run_id,
            self.state.global_step,
            iteration,
            first_step=self.state.global_step - num_steps_done,
            steps_per_epoch=self._num_update_steps(len(pairs)),
            num_epochs=self.args.epochs_per_iteration,
            holds_optimizer=not self.args.save_only_model,
        )
        self.state.max_steps = self._total_steps(place.last_step, iteration + 1)
        if not self._keeps_scheduler:
            rates = [group["lr"] for group in self.optimizer.param_groups]  # a resumed run's are loaded by now
            self._restart_schedule(iteration, min(place.last_step, self.state.max_steps) - place.first_step)
            if num_steps_done > 0:
                self._restore_schedule(rates)
        if self.args.reset_optimizer and iteration > 0 and num_steps_done == 0:
            self.optimizer.state.clear()  # sharded or not; the next step creates the moments anew

    def set_initial_training_values(self, args: SPINConfig, dataloader) -> tuple:
        # Before the first opponent has answered, the numbers of steps are estimates. `begin_iteration` corrects them.
        _, *values, _ = super().set_initial_training_values(args, dataloader)
        return int(args.num_train_epochs), *values, self._total_steps(0, 0)

    def _init_training_state(self, *args) -> tuple[int, int]:
        # Trainer would count epochs by the steps of a single one; the checkpoint's place in the run is known.
        epochs_trained, batches_in_epoch = super()._init_training_state(*args)
        start = self.run.start
        if start.checkpoint is None:
            return epochs_trained, batches_in_epoch
        restore_precisions(self.model, self._precisions)  # the checkpoint is loaded, the optimizer not yet
        if start.is_trained:
            self.state.max_steps = self.state.global_step
            return int(self.args.num_train_epochs), 0
        num_epochs, num_steps = start.place.epochs
        return num_epochs, num_steps * self.args.gradient_accumulation_steps

    def _get_train_sampler(self, train_dataset: PairDataset | None = None) -> Sequence[int]:
        # Trainer's depends on random numbers that were drawn before; an order must be the same on every process, and
        # after a resumption.
        pairs = self.train_dataset if train_dataset is None else train_dataset
        if "rejected_ids" not in pairs.column_names:  # before the first opponent has answered
            return range(len(pairs))
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        strategy = self.args.train_sampling_strategy
        return epoch_order(
            len(pairs),
            self.args.pairs_per_step,
            None if strategy == "sequential" else np.random.default_rng((seed, self.epoch)),
            pair_lengths(pairs, self.args.max_length) if strategy == "group_by_length" else None,
            self.args.dataloader_drop_last,
        ).tolist()

    def _run_epoch(self, **kwargs) -> None:
        # Trainer fixes the loader and its length before the first epoch, but every iteration has its own.
        if self.control.should_training_stop:  # before its first step
            return
        self.epoch = kwargs["epoch"]
        loader = self.get_train_dataloader()
        kwargs["train_dataloader"] = loader
        kwargs["steps_in_epoch"] = len(loader)
        kwargs["num_update_steps_per_epoch"] = math.ceil(len(loader) / self.args.gradient_accumulation_steps)
        with saving_checkpoints(self.args, self.state):
            super()._run_epoch(**kwargs)
        self.accelerator._dataloaders.remove(loader)  # it would keep every loader it ever prepared, with its dataset

    def _num_update_steps(self, num_pairs: int) -> int:
        """Number of optimizer steps in one epoch over `num_pairs` pairs."""
        round_to_int = math.floor if self.args.dataloader_drop_last else math.ceil
        return max(1, round_to_int(num_pairs / self.args.pairs_per_step))

    def _total_steps(self, num_steps: int, first_estimated: int) -> int:
        """Number of steps of the run: those known, and an estimate from the iteration `first_estimated` on."""
        for iteration in range(first_estimated, self.args.num_iterations):
            num_steps += self._num_update_steps(self._expected_pairs(iteration)) * self.args.epochs_per_iteration
        return min(num_steps, self.args.max_steps) if self.args.max_steps > 0 else num_steps

    # Schedules

    def _restart_schedule(self, iteration: int, num_steps: int) -> None:
        """Warm-up and decay over the iteration's own steps, from its own learning rate."""
        rate = self.args.learning_rate_at(iteration)
        own_rates = self._own_rates or [self.args.learning_rate] * len(self.optimizer.param_groups)
        if self.args.has_schedule("learning_rate"):
            own_rates = [own * rate / self.args.learning_rate for own in own_rates]
        set_learning_rate(self.optimizer, own_rates)
        if self.is_deepspeed_enabled:
            # Where DeepSpeed built the optimizer it also steps a scheduler of its own; this one is stepped by Trainer.
            self.model_wrapped.lr_scheduler = None
        self.lr_scheduler = None
        self.create_scheduler(num_steps)
        self.callback_handler.lr_scheduler = self.lr_scheduler

    def _restore_schedule(self, rates: list[float]) -> None:
        """Go on where the checkpoint's schedule stood. Trainer loaded it into the one that was replaced since."""
        path = os.path.join(self.run.start.checkpoint, SCHEDULER_NAME)
        self.lr_scheduler.load_state_dict(torch.load(path, weights_only=True))
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
