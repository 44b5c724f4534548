"""`SPINConfig`: the fields that self-play adds to DPOConfig, and their checks. Knows no files, servers or models."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from transformers.utils import is_torch_bf16_gpu_available
from trl import DPOConfig

from .config_checks import (
    NumberRule,
    at_least,
    check_addresses,
    check_arguments,
    check_choices,
    check_numbers,
    check_weights,
    help_from_docstring,
    is_number,
    not_negative,
    positive,
    share,
    take_mappings,
)
from .objectives.settings import (
    check_losses,
    check_pairs_per_forward,
    check_settings,
    default_settings,
    fields_in_use,
)


_NUMBERS = {
    **dict.fromkeys(("num_iterations", "epochs_per_iteration", "num_generations", "num_opponents"), at_least(1)),
    **dict.fromkeys(("num_history_iterations", "top_k"), at_least(0)),
    "reference_mixture_alpha": NumberRule("in [0, 1]", lambda value: 0 <= value <= 1),
    "max_completion_length": at_least(1, optional=True),
    "per_device_generation_batch_size": at_least(1),
    **dict.fromkeys(("temperature", "eval_temperature"), not_negative("at least 0 (0 is greedy decoding)")),
    "top_p": share("Use 1.0 to consider all tokens."),
    "repetition_penalty": positive(remedy="Use 1.0 for none."),
    "vllm_gpu_memory_utilization": share("Give a share of the GPU's memory, such as 0.3 for 30 %."),
    **dict.fromkeys(("vllm_server_timeout", "vllm_request_timeout"), positive("a positive number of seconds")),
    "publish_check_tolerance": positive(
        optional=True, remedy="To switch the check off, set `publish_check_tolerance=None`."
    ),
    # TRL's and transformers', which let these pass and fail on them late, or never
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), at_least(1)),
    "gradient_accumulation_steps": at_least(1),
    **dict.fromkeys(("precompute_ref_batch_size", "dataset_num_proc"), at_least(1, optional=True)),
    "max_length": at_least(2, optional=True),
    "seed": at_least(0),
    "label_smoothing": NumberRule("in [0, 0.5)", lambda value: 0 <= value < 0.5),
    "weight_decay": not_negative(),
    "max_grad_norm": not_negative(optional=True),
}

# What is not possible in self-play: of a field that is set to this, what is said.
_IMPOSSIBLE = {
    ("ignore_data_skip", True): "would train a resumed iteration's first pairs twice. Skipping them takes no time here",
    ("enable_jit_checkpoint", True): "would save at different steps on different processes. SIGTERM saves a "
    "checkpoint and ends the run anyway",
    ("auto_find_batch_size", True): "would go on with pairs that were scored for another batch size, and count steps "
    "wrongly. Set `per_device_train_batch_size` to what fits",
    ("precompute_ref_log_probs", False): "is not possible in self-play: the reference is the opponent, whose weights "
    "are gone after the policy's first step",
    ("sync_ref_model", True): "is not possible in self-play: the reference moves to the newest opponent in each "
    "iteration anyway",
    ("eval_on_start", True): "comes before the opponent has answered the evaluation prompts. With an `eval_dataset` "
    "the start is evaluated as iteration 0's opponent",
}

# What cannot be, once every number is one: when it is so, and what is said of it, of the configuration `c`.
_REFUSALS: tuple[tuple[Callable[["SPINConfig"], bool], str], ...] = (
    (
        lambda c: c.output_dir is not None and not str(c.output_dir).strip(),
        "`output_dir` must be the path of a directory, got {c.output_dir!r}. Name the one that the run is to be "
        "written to.",
    ),
    (
        lambda c: c.hub_iteration_revisions and not c.push_to_hub,
        "`hub_iteration_revisions=True` pushes each iteration's model, but `push_to_hub` is False. Set both, or "
        "neither.",
    ),
    (
        lambda c: c.hub_iteration_revisions and c.save_strategy == "no",
        "`hub_iteration_revisions=True` pushes the checkpoint in which an iteration ends, but `save_strategy='no'` "
        "saves none. Set it to 'steps' or 'epoch'.",
    ),
    (
        lambda c: c.hub_iteration_revisions and str(c.hub_revision or "").startswith("iteration-"),
        "`hub_revision={c.hub_revision!r}` is for the newest model, but `hub_iteration_revisions=True` gives revisions "
        "of that form to the iterations. Choose another name, or leave it unset for 'main'.",
    ),
    (
        lambda c: c.push_to_hub and c.hub_strategy != "end",
        "`hub_strategy={c.hub_strategy!r}` would push the whole run directory, your data and the answers to it "
        "included. Leave it at 'end'; `hub_iteration_revisions=True` adds each iteration's model.",
    ),
    (
        lambda c: "" in (c.prompt_column, c.completion_column),
        "`prompt_column` and `completion_column` must be the name of a column, got '' for one. Name both, or leave "
        "both unset.",
    ),
    (
        lambda c: (c.prompt_column is None) != (c.completion_column is None),
        "`prompt_column` and `completion_column` go together, got `prompt_column={c.prompt_column!r}` and "
        "`completion_column={c.completion_column!r}`. Set both, or neither to have the format told by the columns.",
    ),
    (
        lambda c: c.load_best_model_at_end and c.metric_for_best_model is None,
        "`load_best_model_at_end=True` needs a metric by which iterations are compared. Set `metric_for_best_model`, "
        "for example to 'nll', or leave both unset.",
    ),
    (
        lambda c: c.num_train_epochs is not None,
        "`num_train_epochs` is set to {c.num_train_epochs}, but it follows from `num_iterations` ({c.num_iterations}) "
        "times `epochs_per_iteration` ({c.epochs_per_iteration}). Set those two instead.",
    ),
    (
        lambda c: c.pairing == "reward_ranked" and c.num_generations < 2,
        "`pairing='reward_ranked'` takes the best and the worst of several answers to a prompt, but `num_generations` "
        "is {c.num_generations}. Set it to 2 or more, or use `pairing='best_of'`.",
    ),
    (
        lambda c: 0 < c.reference_mixture_alpha < 1 and c.f_divergence_type != "reverse_kl",
        "`reference_mixture_alpha={c.reference_mixture_alpha:g}` contradicts `f_divergence_type="
        "{c.f_divergence_type!r}`, in which the mixture's normaliser does not cancel between the two sides. Leave one "
        "of the two unset.",
    ),
    (
        lambda c: c.use_vllm is False and c.vllm_server_base_url is not None,
        "`use_vllm=False` contradicts `vllm_server_base_url={c.vllm_server_base_url!r}`. Leave `use_vllm` unset to use "
        "the server, or the address to generate in-process.",
    ),
)

# Sampling parameters of the server and of transformers that self-play sets itself -> what to do instead.
_RESERVED_SAMPLING = {
    **dict.fromkeys(("max_tokens", "max_new_tokens", "max_length"), "Set `max_completion_length` instead."),
    **dict.fromkeys(("n", "best_of", "num_return_sequences"), "Set `num_generations` instead."),
    "seed": "Set `seed` of the run instead.",
    **dict.fromkeys(("stop_token_ids", "eos_token_id", "pad_token_id"), "The tokenizer and the model give it."),
    **dict.fromkeys(("model", "prompt", "input_ids", "attention_mask", "inputs", "stream", "echo"), "Leave it out."),
    **dict.fromkeys(("suffix", "logprobs", "prompt_logprobs", "return_token_ids"), "Leave it out."),
    **dict.fromkeys(("return_dict_in_generate", "synced_gpus", "streamer"), "Leave it out."),
}

# Flags of a managed server that the run sets itself -> what to know or to do.
_SERVER_FLAGS = {
    **dict.fromkeys(("--host", "--port", "--uds"), "It listens on a Unix socket of this user's. Leave it out."),
    "--api-key": "It needs none: this user alone can reach it. Leave it out.",
    "--model": "It serves the policy's base model. Leave it out.",
    "--served-model-name": "The run knows the model by its own name. Leave it out.",
    "--max-model-len": "It holds the longest prompt and answer; `max_length` limits both. Leave it out.",
}


@help_from_docstring
@dataclass
class SPINConfig(DPOConfig):
    r"""
    Configuration of [`SPINTrainer`]: a [`~trl.DPOConfig`] plus the self-play.

    Only the fields that differ from [`~trl.DPOConfig`] are listed; the others keep their meaning.

    Parameters:
        > Parameters that control the data

        prompt_column (`str`, *optional*):
            Column of the prompts, where it has another name than the accepted formats give it. Several are joined by a
            blank line, empty ones left out: `"instruction+input"`. Goes with `completion_column`.
        completion_column (`str`, *optional*):
            Column of the ground truths, where it has another name. Goes with `prompt_column`.
        train_on_turns (`str`, *optional*, defaults to `'last'`):
            `"last"`: the last message of a conversation is the ground truth. `"all"`: every assistant turn is one, with
            the turns before it as its prompt.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Arguments of the chat template, such as `{"enable_thinking": False}`, for every conversation. A row's own
            `chat_template_kwargs` column wins.
        skip_invalid_rows (`bool`, *optional*, defaults to `False`):
            Whether rows that cannot be played are left out, counted, and listed in `invalid_rows.jsonl` of the run
            directory. By default the first one is an error.
        identical_pairs (`str`, *optional*):
            `"drop"` or `"keep"` pairs whose two sides are equal, because the opponent reproduced the ground truth. By
            default they are kept if some loss in `loss_type` judges the sides separately (`sft`, `bco_pair`, ...), and
            dropped where such a pair cannot move the policy (`sigmoid`, `hinge`, `ipo`, ...).

        > Parameters that control the self-play

        num_iterations (`int`, *optional*, defaults to `3`):
            Number of self-play iterations. In each, the policy as it stands (the opponent) answers every prompt, and
            is then trained to prefer the ground truth over those answers.
        epochs_per_iteration (`int`, *optional*, defaults to `1`):
            Number of epochs over the pairs of each iteration. The paper uses 2.
        num_history_iterations (`int`, *optional*):
            Number of previous iterations whose pairs join the new ones, scored anew by the current opponent. With 0,
            every iteration trains on its own pairs alone. By default 1, as in the paper, and 0 with the losses `space`
            and `iris`, which need answers of the reference itself.
        num_generations (`int`, *optional*, defaults to `1`):
            Number of answers that the opponent gives to each prompt; each makes one pair, unless `pairing` says
            otherwise.
        pairing (`str`, *optional*, defaults to `'ground_truth'`):
            Which sides make a pair. `"ground_truth"`: the ground truth is chosen and each generation rejected, as in
            SPIN; rewards are logged only. The others need `reward_funcs` (see [`SPINTrainer`]) and move the target, as
            SPIN's section 7 proposes. `"best_of"`: the ground truth is chosen, unless the best generation has a
            strictly higher reward; then that one is. Everything else of a lower reward than the chosen one is rejected,
            each in a pair of its own. `"reward_ranked"`: without the ground truth, the best of the `num_generations`
            answers (at least 2) is chosen and the worst rejected, as in verl's recipe. With both, equal rewards make no
            pair. Not for losses of data against opponent, such as `space`.
        reward_weights (`list[float]`, *optional*):
            Weight of each reward function. By default every one counts 1.0.
        reset_optimizer (`bool`, *optional*, defaults to `True`):
            Whether the optimizer's moments start fresh in each iteration, as in the paper. Warm-up and decay of the
            learning rate always run within each iteration.
        reference_mixture_alpha (`float`, *optional*, defaults to `0.0`):
            The share a of the initial model in the reference, whose log-probs are `(1 - a) * log p_t + a * log p_base`
            (alpha-SPIN, arXiv 2404.04291; published). 0 is the opponent alone, as in the paper, and 1 the initial model
            alone, as in online DPO. In between, the mixture has a normaliser, which cancels between the two sides of a
            pair and is not computed: only losses of their difference are possible, `sigmoid`, `hinge`, `exo_pair`,
            `robust`, `aot`, `discopop`, `exponential` and `correlation`, with or without `sft` and `t_spin`. From
            iteration 1 on pairs are scored twice; full fine-tuning loads the initial model beside the policy for that,
            and frees it before the first step. `logps_gap`, `opponent_nll` and the rewards of the evaluation are still
            the opponent's own.
        num_opponents (`int`, *optional*, defaults to `1`):
            From how many of the last opponents that of each prompt is drawn, uniformly (fictitious play, arXiv
            2404.04291; published). In iteration t there are at most `t + 1`. The draw depends on `seed`, iteration and
            row; all answers to a prompt are one opponent's, which [`load_pairs`] names. The reference stays the newest
            opponent: SPIN's loss with a mixed sampler. Evaluated is the newest alone. A server plays adapters all at
            once, full weights one after the other; in-process the policy takes their place for the time of their
            prompts, which is not possible under ZeRO-3 and FSDP.
        space_mu (`float`, *optional*, defaults to `1.0`):
            With `loss_type="space"`, the ratio mu of generated to real data in the loss `-log sig(r(y) - log mu) -
            mu * log sig(log mu - r(y'))`, where `r = log p - log p_t` (SPACE, arXiv 2512.07175; published). At most
            `num_generations`. Its optimum is the data's distribution for every mu; at the first step the loss is
            `log(1 + mu) + mu * log(1 + 1/mu)`.
        t_spin_alpha (`float`, *optional*, defaults to `1.0`):
            With `loss_type="t_spin"`, the scale a of the log-probs in the loss `l(a * (log p(y) - log p(y'))) +
            b * l(a * (log p(y') - log p(y0)))`, where `l(t) = log(1 + e^-t)` and `y0` is the answer of the initial
            policy (T-SPIN, arXiv 2601.08198; published). It has no reference; the opponent's log-probs are computed for
            the metrics alone. Pairs whose two sides are equal count in its second term, so they are kept.
        t_spin_beta (`float`, *optional*, defaults to `0.1`):
            The weight b of the second term there. In iteration 0, where `y' = y0`, there is none. With 0 there never
            is; else iteration 0's answers are kept with the run, and each adds a sequence to the forward pass.
        iris_alpha (`float`, *optional*, defaults to `0.5`):
            With `loss_type="iris"`, the order a in the loss `-[1/(a-1) * log E_y e^((a-1) * r(y)) - 1/a *
            log E_y' e^(a * r(y'))]` (IRIS, arXiv 2604.20933; reconstructed from the formula, prefactors not confirmed).
            The expectations are over all pairs of one forward pass, on all processes: at least two, the more the
            better; over gradient accumulation the loss is averaged. Above 1 single pairs may outweigh all others.
        stop_when_converged (`bool`, *optional*, defaults to `False`):
            Whether the run ends before `num_iterations` when the opponent cannot be told from the data: the held-out
            accuracy (`eval_rewards/accuracies`) of an iteration is within 0.02 of a half, or 98 % of the answers equal
            the ground truth. Where rewards choose (`pairing`), when 98 % of the prompts make no pair.
        on_collapse (`str`, *optional*, defaults to `'warn'`):
            What happens on a sign that self-play makes the policy worse: both sides' log-probs sinking while the
            margins grow, ground truths becoming less likely from one opponent to the next, `logps_gap` falling below 0,
            answers whose length or variety is far from iteration 0's. They are looked for when an iteration's training
            is over, and when its opponent's answers are scored. `"warn"`: a warning that names sign, cause and remedy.
            `"stop"`: the run ends besides. `"rollback"`: it ends with the last opponent before the sign as the policy;
            every opponent is saved for that. Not possible under ZeRO-3 and FSDP.

        > Parameters that control the opponent's generation

        max_completion_length (`int`, *optional*):
            Maximum number of tokens that the opponent generates. By default the 99th percentile of the ground truth's
            lengths, so that the two sides cannot be told apart by where they were cut off.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature. SPIN's theory asks for samples of the opponent itself, which is temperature 1.
        eval_temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature for the answers to the prompts of `eval_dataset`. 0.0 is greedy decoding.
        top_p (`float`, *optional*, defaults to `1.0`):
            Cumulative probability of the tokens to sample from. 1.0 considers all tokens.
        top_k (`int`, *optional*, defaults to `0`):
            Number of most probable tokens to sample from. 0 considers all tokens.
        repetition_penalty (`float`, *optional*, defaults to `1.0`):
            Values above 1.0 discourage repeating tokens of prompt and completion.
        generation_kwargs (`dict[str, Any]`, *optional*):
            Additional sampling parameters, such as `{"min_p": 0.05}`, passed as they are to the server's
            `/v1/completions` (for vLLM) or to `GenerationConfig` (in-process). They win over the fields above.
        per_device_generation_batch_size (`int`, *optional*, defaults to `64`):
            Number of prompts per batch when generating in-process (no vLLM). Completions are written to disk in parts
            of four times as many.

        > Parameters that control the vLLM server

        use_vllm (`bool`, *optional*):
            Whether a vLLM server generates: the one at `vllm_server_base_url`, else a managed one, which the run starts
            on a Unix socket and stops at its end. `False`: the policy generates in-process. Unset: a server if
            `vllm_server_base_url` is given or vLLM is installed here. The run says which and why.
        vllm_server_base_url (`str` or `list[str]`, *optional*):
            Address of a running server, such as `"http://localhost:8000"`, or of several that serve the same model:
            each prompt goes to one that is free. `python -m spin_trl.serve MODEL` starts one with everything the
            trainer needs. The environment variable `VLLM_API_KEY` gives its API key, which is never written to disk.
        vllm_server_model (`str`, *optional*):
            Name under which the server serves the base model, where it differs from the trainer's.
        vllm_server_timeout (`float`, *optional*, defaults to `240.0`):
            Seconds to wait for the server to come up, or to come back.
        vllm_request_timeout (`float`, *optional*, defaults to `600.0`):
            Seconds within which some completion must come back while any is asked for, and within which any other
            request must be answered.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.3`):
            Share of the GPU's memory for a managed server. It has to leave room for the policy on the same GPU. With
            `vllm_sleep` and `offload_policy_during_generation` the server has the GPU to itself: set 0.85.
        vllm_sleep (`bool`, *optional*, defaults to `False`):
            Whether a managed server frees its memory while the policy trains, and takes it again for the next
            iteration. Where vLLM cannot sleep (on a CPU) it is ended, and started again for the next iteration.
        offload_policy_during_generation (`bool`, *optional*, defaults to `False`):
            Whether weights, gradients and optimizer state move to host memory while a server generates, and back to
            score and train. Not for policies that are sharded, nor for quantized ones but bitsandbytes' with 4 bits.
        vllm_server_args (`str`, *optional*):
            Further arguments for a managed server's `vllm serve`, as one string: `"--tensor-parallel-size 2"`.
        publish_check_tolerance (`float`, *optional*, defaults to `0.05`):
            Largest mean absolute difference per token, in nats, between the log-probs that the server gives for a few
            completions of each newly published opponent and the policy's own. In float32 a healthy server is below
            1e-5; in bfloat16 0.015 was reported, and 0.2 for a stale opponent (trl#5312). `None` switches the check
            off.

        > Parameters that control the run directory and what is shown

        resume (`str`, *optional*, defaults to `'never'`):
            What to do with a self-play run that already lies in `output_dir`. `"auto"`: go on from where it stands, or
            start where there is none. `"never"`: refuse; [`SPINTrainer.train`] can still be told to resume.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether a self-play run that already lies in `output_dir` is deleted. Wins over `resume`.
        report (`bool`, *optional*, defaults to `True`):
            Whether `report.html` is written into `output_dir` when the run is over: scores, curves and completions on
            one page. `python -m spin_trl.report` writes it at any time.
        log_completions (`bool`, *optional*, defaults to `False`):
            Whether to print a few prompts with their ground truth and the answers of every opponent so far, once in
            each iteration, and to log them as a table to trackio and Weights & Biases where `report_to` names these.
        hub_iteration_revisions (`bool`, *optional*, defaults to `False`):
            Whether the model that each iteration made is pushed as a revision of its own, `iteration-0` and so on.
            Goes with `push_to_hub`, which pushes the final model to the main revision when the run is over.
        merge_adapter_at_end (`bool`, *optional*, defaults to `False`):
            Whether the trained adapter is also saved merged into its base model, in `output_dir/merged`, to be served
            or trained on without PEFT. The main process loads the base once more for that, in its own memory.

    > [!NOTE]
    > These parameters have other defaults, or other values, than those of [`~trl.DPOConfig`]:
    > - `loss_type`: Also takes `exponential`, `correlation`, `space`, `t_spin` and `iris`, and the names that
    >   `spin_trl.objectives.register` was given, alone or several, which are added with the weights of `loss_weights`.
    >   SPIN's own logistic loss is the default, `sigmoid`.
    > - `learning_rate`: Defaults to `5e-7` instead of `1e-6`, the paper's. One number, or a list with one for each
    >   iteration. After construction, `args.learning_rate` is iteration 0's and [`learning_rate_at`] gives the others.
    > - `beta`: One number, or a list with one for each iteration. After construction, `args.beta` is iteration 0's and
    >   [`beta_at`] gives the others.
    > - `train_sampling_strategy`: Defaults to `"group_by_length"` instead of `"random"`: each batch holds pairs of
    >   similar length, which saves padding. Not with the loss `iris`, for which it stays `"random"`. An epoch's order
    >   follows from `seed` (or `data_seed`) and does not depend on how a batch is divided over processes.
    >   `"batch_rebalance"` is refused.
    > - `metric_for_best_model`: Evaluation metric by which the best iteration is told, with or without `eval_`:
    >   `"nll"`, `"rewards/accuracies"`, ..., or one of `compute_generation_metrics`. The start is compared too.
    > - `greater_is_better`: Unset, it is known for the run's own metrics; yours are better the greater, unless the
    >   name ends in `loss` or `nll`.
    > - `load_best_model_at_end`: Whether the policy is the best iteration's at the end of `train()`, in place of the
    >   last one's. Every opponent, the start and the final policy are saved for that. Not under ZeRO-3 and FSDP.
    > - `precompute_ref_batch_size`: Pairs per device in a batch that is scored. Unset, a batch has twice the tokens of
    >   the largest training batch, instead of as many pairs.
    > - `bf16`: Unset, it is what the machine can: `True` on an accelerator that has it, `False` on a CPU.
    > - `num_train_epochs`: Follows from `num_iterations` and `epochs_per_iteration`; setting it is refused.
    > - `precompute_ref_log_probs`: Always `True`. The opponent's log-probs are computed once per iteration, by the
    >   policy itself; no reference model is ever loaded.
    > - `hub_strategy`: Always `"end"`: the others push the run directory, the user's data included.
    """

    _VALID_DICT_FIELDS = DPOConfig._VALID_DICT_FIELDS + ["chat_template_kwargs", "generation_kwargs"]

    # Parameters whose default values are overridden from DPOConfig
    # Like `loss_type`, these two are lists to the command line and may be a single value elsewhere.
    learning_rate: list[float] = field(default_factory=lambda: [5e-07])
    beta: list[float] = field(default_factory=lambda: [0.1])
    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"])
    train_sampling_strategy: Literal["group_by_length", "random", "sequential"] | None = None
    num_train_epochs: float | None = None
    precompute_ref_log_probs: bool = True
    hub_strategy: str = "end"

    # Parameters that control the data
    prompt_column: str | None = None
    completion_column: str | None = None
    train_on_turns: Literal["last", "all"] = "last"
    chat_template_kwargs: dict[str, Any] | str | None = None
    skip_invalid_rows: bool = False
    identical_pairs: Literal["drop", "keep"] | None = None

    # Parameters that control the self-play
    num_iterations: int = 3
    epochs_per_iteration: int = 1
    num_history_iterations: int | None = None
    num_generations: int = 1
    pairing: Literal["ground_truth", "best_of", "reward_ranked"] = "ground_truth"
    reward_weights: list[float] | None = None
    reset_optimizer: bool = True
    reference_mixture_alpha: float = 0.0
    num_opponents: int = 1
    space_mu: float = 1.0
    t_spin_alpha: float = 1.0
    t_spin_beta: float = 0.1
    iris_alpha: float = 0.5
    stop_when_converged: bool = False
    on_collapse: Literal["warn", "stop", "rollback"] = "warn"

    # Parameters that control the opponent's generation
    max_completion_length: int | None = None
    temperature: float = 1.0
    eval_temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    generation_kwargs: dict[str, Any] | str | None = None
    per_device_generation_batch_size: int = 64

    # Parameters that control the vLLM server
    use_vllm: bool | None = None
    # A list to the command line, as `learning_rate` is; one address stays a single value.
    vllm_server_base_url: list[str] | None = None
    vllm_server_model: str | None = None
    vllm_server_timeout: float = 240.0
    vllm_request_timeout: float = 600.0
    vllm_gpu_memory_utilization: float = 0.3
    vllm_sleep: bool = False
    offload_policy_during_generation: bool = False
    vllm_server_args: str | None = None
    publish_check_tolerance: float | None = 0.05

    # Parameters that control the run directory and what is shown
    resume: Literal["auto", "never"] = "never"
    overwrite_output_dir: bool = False
    report: bool = True
    log_completions: bool = False
    hub_iteration_revisions: bool = False
    merge_adapter_at_end: bool = False

    def __post_init__(self):
        self._take_losses()
        check_numbers(self, _NUMBERS | fields_in_use(self.loss_type))
        check_choices(self, SPINConfig.__annotations__)
        take_mappings(self, ("chat_template_kwargs", "generation_kwargs", "model_init_kwargs"))
        check_weights("reward_weights", self.reward_weights, "Leave out the functions that should not count.")
        check_arguments("vllm_server_args", self.vllm_server_args, _SERVER_FLAGS)
        check_addresses("vllm_server_base_url", self.vllm_server_base_url)
        for (name, value), message in _IMPOSSIBLE.items():
            if bool(getattr(self, name)) is value:
                raise ValueError(f"`{name}={value}` {message}. Leave it unset.")
        for is_so, message in _REFUSALS:
            if is_so(self):
                raise ValueError(message.format(c=self))
        for name in self.generation_kwargs or {}:
            if name in _RESERVED_SAMPLING:
                raise ValueError(
                    f"`generation_kwargs` has {name!r}, which self-play sets itself. {_RESERVED_SAMPLING[name]}"
                )
        self._take_schedules()
        self.num_train_epochs = float(self.num_iterations * self.epochs_per_iteration)
        if self.bf16 is None:  # DPOConfig takes it for granted, and fails on a machine that lacks it
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        # The parent compares checkpoints, which takes an evaluation at each of them. Here iterations are compared.
        best = self.load_best_model_at_end, self.greater_is_better
        self.load_best_model_at_end = False
        super().__post_init__()
        self.load_best_model_at_end, self.greater_is_better = best
        check_settings(self.loss_type, vars(self))
        check_pairs_per_forward(self.loss_type, self.pairs_per_forward)

    @property
    def pairs_per_forward(self) -> int:
        """Pairs of one forward pass in training, on all processes."""
        return self.train_batch_size * self.world_size

    @property
    def pairs_per_step(self) -> int:
        """Pairs of one optimizer step, on all processes."""
        return self.pairs_per_forward * self.gradient_accumulation_steps

    @property
    def takes_back_policies(self) -> list[str]:
        """The settings for which an earlier opponent may become the policy again."""
        best = ["load_best_model_at_end=True"] if self.load_best_model_at_end else []
        return best + (["on_collapse='rollback'"] if self.on_collapse == "rollback" else [])

    @property
    def vllm_server_base_urls(self) -> list[str]:
        """The addresses, one or several; none where no running server is used."""
        given = self.vllm_server_base_url
        return [given] if isinstance(given, str) else list(given or [])

    def learning_rate_at(self, iteration: int) -> float:
        """The peak learning rate of an iteration."""
        return self._schedules.get("learning_rate", {}).get(iteration, self.learning_rate)

    def beta_at(self, iteration: int) -> float:
        """The `beta` of an iteration."""
        return self._schedules.get("beta", {}).get(iteration, self.beta)

    def has_schedule(self, name: str) -> bool:
        """Whether `learning_rate` or `beta` was given per iteration."""
        return name in self._schedules

    def _take_losses(self):
        """As a list, with the defaults that follow from them."""
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        check_losses(self.loss_type, self.loss_weights, changed)
        for name, value in default_settings(self.loss_type).items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def _take_schedules(self):
        """Leave Trainer the numbers of iteration 0, and keep those of the others beside."""
        self._schedules: dict[str, dict[int, float]] = {}
        for name in ("learning_rate", "beta"):
            values = getattr(self, name)
            values = [_to_number(name, value) for value in (values if isinstance(values, list | tuple) else [values])]
            if len(values) not in (1, self.num_iterations):
                raise ValueError(
                    f"`{name}` has {len(values)} values ({values}), but `num_iterations` is {self.num_iterations}. "
                    "Give one number for all iterations, or one for each."
                )
            is_frozen = min(values) == 0 and (len(values) > 1 or name == "beta")  # pairs then teach nothing
            if is_frozen or min(values) < 0:
                raise ValueError(f"`{name}` must be positive, got {min(values)}. Give a positive number.")
            setattr(self, name, values[0])
            if len(values) > 1:
                self._schedules[name] = dict(enumerate(values))

    def __getstate__(self) -> dict[str, Any]:
        """Trainer pickles its arguments beside every model: without the hub's token."""
        return {**self.__dict__, "hub_token": None}

    def to_dict(self) -> dict[str, Any]:
        """As [`~transformers.TrainingArguments.to_dict`], with what was given: lists per iteration."""
        return super().to_dict() | {name: list(schedule.values()) for name, schedule in self._schedules.items()}


def _to_number(name: str, value: Any) -> float:
    try:  # YAML reads 5e-7 as text
        number = float(value)
    except (TypeError, ValueError):
        number = None
    if number is None or not is_number(number):
        raise ValueError(
            f"`{name}` must be a number, or a list with one for each iteration, got {value!r}. Write it such as 5.0e-7."
        )
    return number
