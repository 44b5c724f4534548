"""`SPINTrainer`: what differs from `DPOTrainer`, and nothing else. Knows nothing of HTTP and file names."""

import textwrap
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import is_peft_model
from datasets import Dataset
from huggingface_hub import CommitInfo
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import DataCollator, PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback, TrainerCallback
from transformers.trainer_utils import EvalPrediction, TrainOutput
from trl import DPOTrainer

from .data.rewards.functions import RewardFunction
from .evaluation.best_iteration import check_best_iteration
from .evaluation.held_out import GenerationMetrics
from .iterative_trainer import IterativeTrainer
from .objectives import LogProbs
from .objectives.own_losses import OwnLosses
from .objectives.third_side import INITIAL_IDS, ForwardOfSides, InitialSideCollator
from .play.game import Game
from .play.records import Records
from .play.run_ends import begin_run, finish_run
from .play.setup import SelfPlaySetup
from .play.turns import Turns
from .policy.adapters import check_initial_reference, check_trainable, complete_reference_adapter
from .policy.finite import ORIGIN_COLUMNS, OriginCollator, StepNumbers, take_origins
from .policy.inputs import check_generation_metrics, check_optimizers
from .policy.merging import check_can_be_merged, check_can_merge_at_end
from .policy.offload import Offloader
from .policy.optimizer import check_schedule
from .policy.policy import Policy
from .policy.published_form import check_can_lend, check_can_take_back
from .policy.quantization import keep_weights_as_quantized
from .policy.sharding import Sharding, check_can_generate
from .processes.progress import RunProgress
from .processes.ranks import failing_together, on_main_process
from .processes.stop_signal import EXIT_STATUS, StopOnSigterm
from .report.completion_table import ShowCompletions
from .report.hub import PushIterations, push_model, warns_of_failed_push
from .report.log_file import LogFileCallback
from .report.model_card import complete_card
from .report.page import write_end_report
from .run_directory.checkpoints import MarkCheckpoint, Place
from .run_directory.disk import writing
from .run_directory.store import IterationStore
from .self_play import SelfPlayCallback
from .spin_config import SPINConfig


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig


class SPINTrainer(IterativeTrainer):
    """
    Trainer for Self-Play Fine-Tuning (SPIN).

    Differs from [`~trl.DPOTrainer`] in where the pairs and the reference come from. The dataset holds prompts and
    ground truths only. At the start of every iteration the policy as it stands becomes the opponent: it answers every
    prompt, its answers are the rejected side, and its log-probs, computed once by the policy itself, are the
    reference. No reference model is ever loaded.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from peft import LoraConfig
    >>> from spin_trl import SPINConfig, SPINTrainer

    >>> trainer = SPINTrainer(
    ...     model="Qwen/Qwen2.5-7B-Instruct",
    ...     args=SPINConfig(output_dir="out", num_iterations=3, vllm_server_base_url="http://localhost:8000"),
    ...     train_dataset=load_dataset("json", data_files="sft.jsonl", split="train"),  # prompt + completion
    ...     peft_config=LoraConfig(r=16, target_modules="all-linear"),
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy, as for [`~trl.DPOTrainer`]. The first opponent is this model as it is.
        args ([`SPINConfig`], *optional*):
            Configuration. If `None`, a default one is used.
        data_collator ([`~transformers.DataCollator`], *optional*):
            As for [`~trl.DPOTrainer`].
        train_dataset ([`~datasets.Dataset`]):
            Prompts and ground truths, in one of the formats of [`data.ACCEPTED_FORMATS`].
        eval_dataset ([`~datasets.Dataset`], *optional*):
            The same kind of rows. Its prompts are answered by every opponent and by the final policy.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer. By default the model's own.
        compute_metrics (`Callable`, *optional*):
            As for [`~trl.DPOTrainer`].
        compute_generation_metrics (`Callable[[list, list[str], list[str]], dict[str, float]]`, *optional*):
            Called with the prompts (as in the dataset), the ground truths and the answers (text) of `eval_dataset`.
        reward_funcs (`Callable` or `list[Callable]`, *optional*):
            Functions in the signature of [`~trl.GRPOTrainer`], synchronous or asynchronous: called with `prompts`,
            `completions`, `completion_ids` and, as keyword arguments, the other columns of `train_dataset`,
            `trainer_state` and `ground_truth` (the ground truths' text), they return a number, or `None` where they do
            not apply, for each completion. They judge the ground truths and the generations of every iteration, on the
            main process, in batches of up to 1,024; `args.pairing` says what for. Reward models are called by a
            function of yours.
        preference_dataset ([`~datasets.Dataset`], *optional*):
            Preference pairs of yours, with `prompt`, `chosen` and `rejected` in TRL's format, text or messages. They
            join the pairs of every iteration as they are, each once, scored anew by each opponent: the same loss, with
            the opponent as reference, on both. No opponent answers their prompts.
        callbacks, optimizers, quantization_config, peft_config:
            As for [`~trl.DPOTrainer`].

    Raises:
        `ValueError`, `TypeError`, [`SamplerError`]: for bad data, contradicting settings or a server that cannot play
        this run, all before the model is loaded.
    """

    _tag_names = ["trl", "spin"]
    _name = "SPIN"
    _paper = {
        "title": "Self-Play Fine-Tuning Converts Weak Language Models to Strong Language Models",
        "id": "2401.01335",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{chen2024self,
                title        = {{Self-Play Fine-Tuning Converts Weak Language Models to Strong Language Models}},
                author       = {Zixiang Chen and Yihe Deng and Huizhuo Yuan and Kaixuan Ji and Quanquan Gu},
                year         = 2024,
                booktitle    = {Forty-first International Conference on Machine Learning, {ICML} 2024},
            }"""),
    }

    @failing_together()
    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        args: SPINConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        compute_generation_metrics: GenerationMetrics | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
        ref_model: None = None,
        reward_funcs: RewardFunction | list[RewardFunction] | None = None,
        preference_dataset: Dataset | None = None,
    ):
        if ref_model is not None:
            raise ValueError(
                "`ref_model` is not used in self-play: the reference is the opponent, that is the policy as it stands "
                "when an iteration begins, and its log-probs are computed before the first step. Leave it out."
            )
        check_optimizers(optimizers)
        check_generation_metrics(compute_generation_metrics, eval_dataset)
        self.self_play_setup = SelfPlaySetup.prepare(
            model,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            peft_config,
            quantization_config,
            reward_funcs,
            preference_dataset,
        )
        args = self.self_play_setup.args
        check_schedule(args, *optimizers)
        check_best_iteration(args, eval_dataset is not None, compute_generation_metrics is not None)
        sharding = Sharding.of(args)
        for setting in args.takes_back_policies:
            check_can_take_back(setting, self.self_play_setup.publication, sharding)
        if self.self_play_setup.choice.mode == "in-process":
            check_can_generate(sharding)
            if args.num_opponents > 1:
                check_can_lend(args.num_opponents, self.self_play_setup.publication, sharding)
        if args.initial_reference is not None:
            check_initial_reference(peft_config, args.initial_reference)
        if args.merge_adapter_at_end:
            check_can_merge_at_end(model, peft_config, self.self_play_setup.model_name, args)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=self.self_play_setup.train_dataset,
            processing_class=self.self_play_setup.tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        check_trainable(self.model, None)
        if self.self_play_setup.quantization is not None:
            keep_weights_as_quantized(self.model)
        if self.self_play_setup.publication.kind == "merged":
            check_can_be_merged(self.model)
        # Errors name rows of the user's data, so they travel with each batch. The collator sees what it always saw.
        hidden = ORIGIN_COLUMNS if args.remove_unused_columns else []
        self.data_collator = OriginCollator(InitialSideCollator(self.data_collator), hidden)
        self.own_losses = OwnLosses(self.loss_types, self.loss_weights, vars(args), self.accelerator)
        self.loss_types, self.loss_weights = self.own_losses.trl_loss_types, self.own_losses.trl_loss_weights
        if is_peft_model(self.model) and "ref" in self.model.peft_config:
            if args.initial_reference is None:
                self.model.delete_adapter("ref")  # DPOTrainer's copy of a trained adapter; the reference moves here
            else:
                complete_reference_adapter(self.model)
        self.store = IterationStore(args.output_dir)
        self.policy = Policy(self, self.self_play_setup.publication)
        self.sampler = self.self_play_setup.build_sampler(self.policy.whole)
        offloader = Offloader(self.policy.training_tensors) if args.offload_policy_during_generation else None
        self.turns = Turns(args.vllm_sleep, offloader)
        self.game = Game(
            self.self_play_setup,
            self.policy,
            self.sampler,
            self.store,
            self.run,
            Records(self.store, self.log_self_play, lambda: self.state.log_history),
            self.turns,
            lambda: self.state,
            compute_generation_metrics,
            self.self_play_setup.build_rewards(train_dataset),
        )
        self.stop_signal = StopOnSigterm()
        self_play = SelfPlayCallback(self.game, self.stop_signal, self.begin_iteration)
        # First of all, so that trackers and the progress bar are still open when the final policy is evaluated.
        self.callback_handler.callbacks.insert(0, self_play)
        self.add_callback(LogFileCallback(self.run, self.store))
        if args.hub_iteration_revisions:
            self.add_callback(PushIterations(self.store, self.hub_model_id))
        if args.log_completions:
            self.add_callback(ShowCompletions(self.store, self.self_play_setup.tokenizer))
        self.add_callback(MarkCheckpoint(self._place, args.save_total_limit))
        if self.pop_callback(ProgressCallback) is not None:  # else the bar is a notebook's, or there is none
            self.add_callback(RunProgress(args.num_iterations))
        self.add_callback(self.stop_signal)

    # What DPOTrainer does with a dataset of pairs at start is done per iteration, by `SelfPlayCallback`.

    def _prepare_dataset(self, dataset: Dataset, *args, **kwargs) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *args, **kwargs) -> Dataset:
        return dataset

    # Objectives that DPOTrainer lacks

    def _compute_loss(self, model, inputs, return_outputs):
        """DPOTrainer's losses and all its metrics, and the losses that it lacks from the same forward pass."""
        origins, forward = take_origins(inputs), ForwardOfSides(model, inputs)
        result = super()._compute_loss(forward, inputs, return_outputs)
        sides = forward.sides()
        self._numbers = StepNumbers(sides, origins)
        if "initial" in sides:
            mode = "train" if self.model.training else "eval"
            initial_logps = self.accelerator.gather(sides["initial"].detach())
            self._metrics[mode]["logps/initial"].append(initial_logps.mean().item())
        loss, *outputs = result if return_outputs else [result]
        logps = LogProbs(**sides, ref_chosen=inputs["ref_chosen_logps"], ref_rejected=inputs["ref_rejected_logps"])
        loss = loss + self.own_losses(logps, self.beta)
        return (loss, *outputs) if return_outputs else loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As DPOTrainer's, but in training a loss that is no number is an error, before a gradient is taken of it."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.model.training:
            loss = result[0] if return_outputs else result
            self._numbers.require_finite(loss.detach(), self.state.global_step + 1, self.run.iteration)
        self._numbers = None
        return result

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *ORIGIN_COLUMNS, INITIAL_IDS]))

    def log_self_play(self, metrics: dict[str, float]) -> None:
        """Log an iteration's metrics, without those of training steps that have not been logged yet."""
        is_step_to_log = self.control.should_log
        super(DPOTrainer, self).log(dict(metrics))
        self.control.should_log = is_step_to_log  # any log would count as that of the step

    # The run

    @failing_together()
    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """
        Play all iterations, or those that are left.

        On SIGTERM the current step is finished, a checkpoint saved, and the process ends with status 143.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                `True` goes on from where the run in `output_dir` stands, wherever it was stopped; so does
                `args.resume="auto"`, which starts a run where there is none. A checkpoint in `output_dir` goes on from
                there; what was made after it is deleted.
            *args, **kwargs:
                As for [`~transformers.Trainer.train`].

        Raises:
            `FileExistsError`: if `output_dir` holds a self-play run that is neither to be resumed nor overwritten.
            [`RunDirectoryError`]: if the run there cannot be resumed, or another process is running it.
            `FloatingPointError`: if a loss or a log-prob is no number; it names the rows of the data.
            The error of whichever process fails first, on all of them.
        """
        requested = _as_bool_or_path(resume_from_checkpoint)
        with ExitStack() as stack:
            on_main_process(lambda: stack.enter_context(self.store.lock()))
            self.game.begin(on_main_process(lambda: begin_run(self.self_play_setup, self.store, requested)))
            stack.enter_context(self.stop_signal.listening())
            start = self.run.start
            if not start.is_finished:
                stack.callback(self.turns.end)  # when the server is gone
                stack.callback(self.self_play_setup.close_sampler, self.sampler)
                self._start_sampler()
            output = super().train(None if start.checkpoint is None else str(start.checkpoint), *args, **kwargs)
            if self.stop_signal.has_stopped:
                self.accelerator.print(f"Stopped by SIGTERM after step {self.state.global_step}.")
                raise SystemExit(EXIT_STATUS)
            finish_run(self.run, self.args, self.store, self.game.opponents)
            self.create_model_card(model_name=Path(self.args.output_dir).name)
            self._save_merged()
            if self.args.report and not start.is_finished:
                on_main_process(lambda: write_end_report(self.store.output_dir))
            if self.args.push_to_hub:
                with warns_of_failed_push(self.hub_model_id, self.args.hub_revision):
                    self.push_to_hub()
            return output

    def create_model_card(self, *args, **kwargs) -> None:
        """As [`~trl.DPOTrainer`]'s, with scores and answers by iteration and the settings."""
        with writing(Path(self.args.output_dir, "README.md")):
            super().create_model_card(*args, **kwargs)
            if self.is_world_process_zero():
                complete_card(self.store, self.args, self.self_play_setup.model_name)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs,
    ) -> CommitInfo | None:
        """As [`~transformers.Trainer.push_to_hub`], but only the model and its card, and it waits for the push."""
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        self.create_model_card(**{"model_name": Path(self.args.hub_model_id or self.args.output_dir).name, **kwargs})
        if not self.is_world_process_zero():
            return None
        revision = revision or self.args.hub_revision
        return push_model(self.args.output_dir, self.hub_model_id, revision, commit_message, token)

    def _save_merged(self) -> None:
        directory = self.store.output_dir / "merged"
        is_there = on_main_process(lambda: self.run.start.is_finished and directory.is_dir())
        if self.args.merge_adapter_at_end and not is_there:
            self.policy.save_merged(self.self_play_setup.model_name, directory)

    def _start_sampler(self) -> None:
        self.self_play_setup.write_served_base(self.model)
        self.turns.give_to_server()  # it takes its memory when it starts
        self.self_play_setup.open_sampler(self.sampler)
        self.turns.begin(self.self_play_setup.server_rest(self.sampler))
        self.turns.give_to_policy(briefly=True)

    def _place(self) -> Place:
        return Place(
            run_id=self.store.run_id,
            step=self.state.global_step,
            iteration=self.run.iteration,
            first_step=self.run.first_step,
            steps_per_epoch=self.run.steps_per_epoch,
            num_epochs=self.run.num_epochs,
            pairs=self.store.pairs_checksum(self.run.iteration),
            holds_optimizer=not self.args.save_only_model,
        )

    # What the training loop asks

    def _num_new_pairs(self) -> int:
        return len(self.self_play_setup.train_dataset) * self.args.max_pairs_per_prompt

    def _num_other_pairs(self) -> int:
        preferences = self.self_play_setup.preferences
        return 0 if preferences is None else len(preferences)


def _as_bool_or_path(value: str | bool | None) -> str | bool | None:
    """What `resume_from_checkpoint` means: the command line gives booleans as text."""
    return {"true": True, "false": None, False: None}.get(value.lower() if isinstance(value, str) else value, value)
