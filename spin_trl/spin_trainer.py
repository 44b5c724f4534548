"""`SPINTrainer`: what differs from `DPOTrainer`, and nothing else. Knows nothing of HTTP and file names."""

import textwrap
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, ProgressCallback
from transformers.trainer_utils import TrainOutput

from .data.rewards.functions import RewardFunction
from .evaluation.held_out import GenerationMetrics
from .generation.sampler import OpponentSampler
from .iterative_trainer import IterativeTrainer
from .objectives import LogProbs
from .objectives.own_losses import OwnLosses
from .objectives.third_side import ForwardOfSides, InitialSideCollator
from .play.checks import BEFORE_WEIGHTS, OF_THE_MODEL, refuse
from .play.game import Game
from .play.plan import Plan
from .play.run_ends import begin_run, finish_run, open_sampler
from .policy.adapters import settle_reference_adapter
from .policy.finite import collate_with_origins, require_finite_loss, take_origins
from .policy.policy import Policy
from .policy.quantization import keep_weights_as_quantized
from .processes.progress import RunProgress
from .processes.ranks import failing_together, on_main_process
from .processes.stop_signal import StopOnSignal
from .report.callbacks import callbacks_of
from .report.hub import push_model, warns_of_failed_push
from .report.model_card import complete_card
from .report.page import write_end_report
from .run_directory.checkpoints import MarkCheckpoint, Place
from .run_directory.disk import writing
from .run_directory.store import IterationStore
from .self_play import SelfPlayCallback
from .spin_config import SPINConfig


class SPINTrainer(IterativeTrainer):
    """
    Trainer for Self-Play Fine-Tuning (SPIN).

    Differs from [`~trl.DPOTrainer`] in where the pairs and the reference come from. The dataset holds prompts and
    ground truths only. At the start of every iteration the policy as it stands becomes the opponent: it answers every
    prompt, its answers are the rejected side, and its log-probs, computed once by the policy itself, are the
    reference. No reference model is ever loaded.

    Example:

    ```python
    >>> trainer = SPINTrainer(
    ...     "Qwen/Qwen2.5-7B-Instruct",
    ...     SPINConfig(output_dir="out", num_iterations=3, vllm_server_base_url="http://localhost:8000"),
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
        train_dataset ([`~datasets.Dataset`]):
            Prompts and ground truths, in one of the formats of [`formats.ACCEPTED_FORMATS`].
        eval_dataset ([`~datasets.Dataset`], *optional*):
            The same kind of rows. Its prompts are answered by every opponent and by the final policy.
        compute_generation_metrics (`Callable[[list, list[str], list[str]], dict[str, float]]`, *optional*):
            Called with the prompts (as in the dataset), the ground truths and the answers (text) of `eval_dataset`.
        reward_funcs (`Callable` or `list[Callable]`, *optional*):
            Judge answers as [`~trl.GRPOTrainer`]'s do; `args.pairing` says what for. See docs/rewards.md.
        preference_dataset ([`~datasets.Dataset`], *optional*):
            Preference pairs of yours in TRL's format, text or messages. They join the pairs of every iteration as they
            are, scored anew by each opponent.
        sampler ([`OpponentSampler`], *optional*):
            What answers as the opponents, in place of a vLLM server or the policy itself. See docs/samplers.md.
        **dpo:
            As for [`~trl.DPOTrainer`]: `data_collator`, `processing_class`, `compute_metrics`, `callbacks`,
            `optimizers`, `quantization_config` and `peft_config`.

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
        model: str | PreTrainedModel | PeftModel,
        args: SPINConfig | None = None,
        *,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        compute_generation_metrics: GenerationMetrics | None = None,
        reward_funcs: RewardFunction | list[RewardFunction] | None = None,
        preference_dataset: Dataset | None = None,
        sampler: OpponentSampler | None = None,
        **dpo: Any,
    ):
        given = train_dataset, eval_dataset, compute_generation_metrics, reward_funcs, preference_dataset, sampler
        self.plan = plan = Plan(model, args, *given, dpo)
        refuse(BEFORE_WEIGHTS, plan)
        plan.announce()
        plan.args.remove_unused_columns = False  # errors name rows, which need more columns than the model does
        super().__init__(
            model=model,
            args=plan.args,
            train_dataset=plan.data.train,
            expected_pairs=plan.expected_pairs,
            # PEFT fills the configuration in; the user's, given to the next trainer, must still be the same.
            **{**dpo, "processing_class": plan.tokenizer, "peft_config": deepcopy(plan.peft_config)},
        )
        refuse(OF_THE_MODEL, plan, self.model)
        if plan.quantization is not None:
            keep_weights_as_quantized(self.model)
        settle_reference_adapter(self.model, is_needed=plan.args.reference_mixture_alpha > 0)
        self.data_collator = partial(collate_with_origins, InitialSideCollator(self.data_collator))
        self.own_losses = OwnLosses(self.loss_types, self.loss_weights, vars(self.args), self.accelerator)
        self.loss_types, self.loss_weights = self.own_losses.trl_loss_types, self.own_losses.trl_loss_weights
        self.store = IterationStore(self.args.output_dir)
        self.policy = Policy(self, plan.publication)
        self._set_up_game()

    def _set_up_game(self) -> None:
        plan, args, store = self.plan, self.args, self.store
        pad_token_id, vocab_size = plan.tokenizer.pad_token_id, plan.vocab_size
        self.sampler = plan.sampler or plan.sampler_host.build(
            self.policy.whole, pad_token_id, vocab_size, plan.max_length
        )
        self.game = Game(plan, self.policy, self.sampler, store, self.run, self.log_beside_steps, lambda: self.state)
        self.stop_signal = StopOnSignal()
        self_play = SelfPlayCallback(self.game, self.stop_signal, self.begin_iteration)
        # First of all, so that trackers and the progress bar are still open when the final policy is evaluated.
        self.callback_handler.callbacks.insert(0, self_play)
        if self.pop_callback(ProgressCallback) is not None:  # else the bar is a notebook's, or there is none
            self.add_callback(RunProgress(args.num_iterations))

        def place() -> Place:
            pairs = store.pairs(self.run.iteration).checksum()
            return replace(self.run.place, step=self.state.global_step, pairs=pairs)

        shown = callbacks_of(args, self.run, store, plan.tokenizer, self.hub_model_id)
        for callback in (*shown, MarkCheckpoint(place, args.save_total_limit), self.stop_signal):
            self.add_callback(callback)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        DPOTrainer's losses and all its metrics, and the losses that it lacks from the same forward pass. In training a
        loss that is no number is an error, before a gradient is taken of it.
        """
        origins, forward = take_origins(inputs), ForwardOfSides(model, inputs)
        result = super().compute_loss(forward, inputs, return_outputs, num_items_in_batch)
        loss, *outputs = result if return_outputs else [result]
        sides = forward.sides()
        logps = LogProbs(**sides, ref_chosen=inputs["ref_chosen_logps"], ref_rejected=inputs["ref_rejected_logps"])
        loss = loss + self.own_losses(logps, self.beta)
        mode = "train" if self.model.training else "eval"
        if "initial" in sides:
            initial = self.accelerator.gather(sides["initial"].detach())
            self._metrics[mode]["logps/initial"].append(initial.mean().item())
        if mode == "train":
            require_finite_loss(loss.detach(), sides, origins, self.state.global_step + 1, self.run.iteration)
        return (loss, *outputs) if return_outputs else loss

    @failing_together()
    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """
        Play all iterations, or those that are left.

        On SIGTERM or Ctrl-C the current step is finished and a checkpoint saved. Then the process ends with status 143,
        or `KeyboardInterrupt` is raised. A second signal does not wait for the step.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                `True` goes on from where the run in `output_dir` stands; so does `args.resume="auto"`, which starts a
                run where there is none. A checkpoint goes on from there; what was made after it is deleted.

        Raises:
            `FileExistsError`: if `output_dir` holds a self-play run that is neither to be resumed nor overwritten.
            [`RunDirectoryError`]: if the run there cannot be resumed, or another process is running it.
            `FloatingPointError`: if a loss or a log-prob is no number; it names the rows of the data.
        """
        with ExitStack() as stack:
            on_main_process(lambda: stack.enter_context(self.store.lock()))
            start = on_main_process(lambda: begin_run(self.plan, self.store, resume_from_checkpoint))
            self.game.begin(start)
            stack.enter_context(self.stop_signal.listening())
            if not start.is_finished:
                stack.enter_context(open_sampler(self.game))
            output = super().train(None if start.checkpoint is None else str(start.checkpoint), *args, **kwargs)
            if self.stop_signal.has_stopped:
                self.accelerator.print(f"Stopped by a signal after step {self.state.global_step}.")
                self.stop_signal.end_if_requested()
            with self.stop_signal.between_steps():
                finish_run(self.game)
                self.create_model_card(model_name=Path(self.args.output_dir).name)
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
                complete_card(self.store, self.args, self.plan.model_name)

    def push_to_hub(self, commit_message="End of training", blocking=True, token=None, revision=None, **kwargs):
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
