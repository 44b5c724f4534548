"""What a run refuses, in two lists: before any weights are loaded, and of the loaded model.

The rules themselves stand in the rooms that they are of. What is no rule of one room alone stands here.
"""

import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import EarlyStoppingCallback, PreTrainedModel
from trl import DPOTrainer

from ..data.formats import check_dataset
from ..data.preferences import check_preference_dataset
from ..evaluation.best_iteration import check_best_iteration
from ..generation.vllm.serve_command import serve_command
from ..policy.adapters import check_initial_reference, check_trainable, warn_of_half_precision
from ..policy.inputs import (
    check_generation_kwargs,
    check_generation_metrics,
    check_model,
    check_peft_config,
    require_type,
)
from ..policy.merging import check_can_be_merged, check_can_merge_at_end
from ..policy.optimizer import check_schedule
from ..policy.published_form import check_can_take_back
from ..policy.quantization import check_trains_adapter
from ..policy.sharding import check_can_generate
from ..policy.sizes import weight_sizes
from ..processes.ranks import on_main_process
from ..run_directory.disk import check_writable
from ..run_directory.footprint import check_footprint
from ..run_directory.resume import check_same_run
from ..run_directory.store import IterationStore
from ..spin_config import SPINConfig
from .opponents import is_saved
from .plan import Plan
from .turns import check_turns


def refuse(checks: Sequence[Callable[..., None]], *of: object) -> None:
    """Run the checks, of which the first that does not hold raises."""
    for check in checks:
        check(*of)


def arguments(plan: Plan) -> None:
    """Everything that was passed is of the kind that it must be."""
    inspect.signature(DPOTrainer.__init__).bind_partial(None, **plan.dpo)  # as Python itself, but before anything else
    if plan.dpo.get("ref_model") is not None:
        raise ValueError(
            "`ref_model` is not used in self-play: the reference is the opponent, that is the policy as it stands "
            "when an iteration begins, and its log-probs are computed before the first step. Leave it out."
        )
    if plan.dpo.get("compute_metrics") is not None:
        raise ValueError(
            "`compute_metrics` is never called: it is for the logits of an evaluation within an iteration. Pass "
            "`compute_generation_metrics`, which is called with the answers of every opponent."
        )
    if any(isinstance(callback, EarlyStoppingCallback) for callback in plan.dpo.get("callbacks") or ()):
        raise ValueError(
            "`EarlyStoppingCallback` counts evaluations within an epoch, of which there are none. Leave it out: "
            "`stop_when_converged=True` ends a run early, `load_best_model_at_end=True` ends it with the best model."
        )
    expected = "a pair of an optimizer and a scheduler, each of which may be None"
    require_type("optimizers", plan.dpo.get("optimizers", ()), tuple | list, expected, "Pass `(optimizer, None)`.")
    check_generation_metrics(plan.compute_generation_metrics, plan.eval_dataset)
    check_model(plan.model)
    check_peft_config(plan.peft_config)
    if not isinstance(plan.model, str):
        check_trainable(plan.model, plan.peft_config)
    args = plan.given_args
    if args is not None and not isinstance(args, SPINConfig):
        raise TypeError(
            f"`args` must be a `SPINConfig`, got `{type(args).__name__}`. Write `SPINConfig(...)`, which takes every "
            "field of `DPOConfig`. There is no `ref_model`: `args` comes right after the model."
        )


def settings(plan: Plan) -> None:
    """The configuration fits what was passed beside it, and the run directory can be one."""
    args = plan.args
    if args.eval_strategy != "no":
        raise ValueError(
            f"`eval_strategy={args.eval_strategy.value!r}` evaluates within an iteration, which is not supported: "
            "every opponent and the final policy are evaluated as soon as an `eval_dataset` is given. Leave "
            "`eval_strategy` unset."
        )
    _ = plan.rewards  # looked at with `pairing`
    check_schedule(args, *plan.dpo.get("optimizers", (None, None)))
    check_best_iteration(args, plan.eval_dataset is not None, plan.compute_generation_metrics is not None)
    on_main_process(lambda: check_writable(Path(plan.args.output_dir).absolute()))


def datasets(plan: Plan) -> None:
    """The rows are in a format that is known."""
    args = plan.args
    check_dataset(plan.train_dataset, "train_dataset", args.prompt_column, args.completion_column)
    if plan.eval_dataset is not None:
        check_dataset(plan.eval_dataset, "eval_dataset", args.prompt_column, args.completion_column)
    if plan.preference_dataset is not None:
        check_preference_dataset(plan.preference_dataset, args.loss_type)


def sampler(plan: Plan) -> None:
    """What is to answer can play the opponents of this run."""
    args, mode = plan.args, plan.choice.mode
    asked = [f"`{name}`" for name in ("use_vllm", "vllm_server_base_url") if getattr(args, name)]
    if plan.sampler is not None and asked:
        raise ValueError(
            f"`sampler` is given, and {' and '.join(asked)} asks for a vLLM server: one of them has to answer. Leave "
            "the sampler out, or the settings unset."
        )
    check_turns(args, mode, plan.sharding, plan.quantization)
    if mode == "in-process":
        check_generation_kwargs(args.generation_kwargs)
        check_can_generate(plan.sharding)
    if mode == "managed":
        serve_command(plan.model_name, lora_rank=plan.publication.lora_rank)  # refuses what it would refuse later
        is_loadable = plan.serves_dequantized or isinstance(plan.model, str) or os.path.isdir(plan.model_name)
        if not is_loadable:
            raise ValueError(
                f"A managed server loads the base model itself, but the model passed comes from {plan.model_name!r}, "
                "which is no folder here. Save it with `model.save_pretrained(folder)` and pass `model=folder`."
            )


def adapter(plan: Plan) -> None:
    """The reference and the end of the run can do with the adapter what they are to do."""
    check_trains_adapter(plan.quantization, plan.adapter is not None)
    if plan.args.reference_mixture_alpha > 0:
        check_initial_reference(plan.peft_config, plan.args.reference_mixture_alpha)
    if plan.args.merge_adapter_at_end:
        check_can_merge_at_end(plan.adapter, plan.model_name, plan.args)


def earlier_opponents(plan: Plan) -> None:
    """Where an earlier opponent is to be the policy again, for good or for a while, it can be."""
    remedies = dict.fromkeys(
        plan.args.takes_back_policies,
        "Leave it unset: every opponent is saved in `iteration-*/opponent`, and `self_play.json` names the one that "
        "counts.",
    )
    if plan.args.num_opponents > 1 and not plan.reads_checkpoints:
        remedies[f"num_opponents={plan.args.num_opponents}"] = "Use a vLLM server, which loads opponents itself."
    for setting, remedy in remedies.items():
        check_can_take_back(setting, remedy, plan.publication, plan.sharding)


def rows(plan: Plan) -> None:
    """Every row can be played, in the model and on the server, and reward functions can judge it."""
    data, judge = plan.data, plan.judge
    if judge is not None:
        on_main_process(lambda: judge.try_on(data.train))


def same_run(plan: Plan) -> None:
    """A run that lies there, and is to go on, is this one."""
    store = IterationStore(plan.args.output_dir)
    if plan.args.resume == "auto" and store.has_run() and not plan.args.overwrite_output_dir:
        on_main_process(lambda: check_same_run(store, plan.describe()))


def weights(plan: Plan, model: PreTrainedModel) -> None:
    check_trainable(model, None)
    if not plan.sharding.engine:  # those keep the weights in float32 themselves
        warn_of_half_precision(model)
    if plan.publication.kind == "merged":
        check_can_be_merged(model)


def disk(plan: Plan, model: PreTrainedModel) -> None:
    """What the run writes fits on the disk."""
    args, sizes = plan.args, weight_sizes(model, merged=plan.publication.kind == "merged")
    iterations = range(args.num_iterations + (plan.data.eval is not None))  # the final policy is evaluated as one more
    num_opponents = sum(is_saved(i, args, plan.reads_checkpoints, plan.base_is_opponent) for i in iterations)
    on_main_process(lambda: check_footprint(args, sizes, num_opponents, plan.serves_dequantized))


BEFORE_WEIGHTS = (
    arguments,
    settings,
    datasets,
    sampler,
    adapter,
    earlier_opponents,
    rows,
    same_run,
)
OF_THE_MODEL = (weights, disk)
