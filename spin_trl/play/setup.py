"""Everything a run settles before a model is loaded: tokens, lengths, the sampler, and what of it cannot work.

Knows nothing of training.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from trl.trainer.utils import get_config_model_id

from .. import __version__
from ..data.columns import numbers
from ..data.formats import check_dataset
from ..data.preferences import check_preference_dataset, prepare_preferences
from ..data.preparation import dataset_checksum, drop_long_prompts, percentile_length, prepare_data
from ..data.rewards.functions import RewardFunctions, check_rewards
from ..data.rewards.judged_answers import AnswerRewards
from ..generation.opening import SamplerChoice, SamplerHost, choose_sampler
from ..generation.sampler import OpponentSampler, SamplingParams
from ..generation.vllm.managed_server import ManagedServer
from ..generation.vllm.rest import ServerRest
from ..generation.vllm.serve_command import can_serve, serve_command
from ..objectives.settings import depends_on_batch, sampling_caveats
from ..policy.adapters import check_trainable, describe_adapter, starts_as_base
from ..policy.inputs import (
    check_generation_kwargs,
    check_model,
    check_peft_config,
    end_token_ids,
    load_tokenizer,
    model_config,
)
from ..policy.merging import save_base
from ..policy.published_form import Publication, adapter_config, plan_publication
from ..policy.quantization import check_trains_adapter, differs_on_server, find_quantization, serves_dequantized
from ..policy.sharding import Sharding
from ..policy.sizes import empty_policy, weight_sizes
from ..processes.ranks import main_process_first, on_main_process
from ..run_directory.description import changed_settings
from ..run_directory.disk import check_writable
from ..run_directory.footprint import check_footprint, num_saved_opponents
from ..run_directory.resume import check_same_run
from ..run_directory.store import IterationStore
from ..run_directory.whole_files import write_directory
from ..spin_config import SPINConfig
from .turns import check_turns


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig

logger = get_logger(__name__)

_DEFAULT_LENGTH_PERCENTILE = 99
_NO_LIMIT = 1_000_000_000  # tokens
_RECORDED_PACKAGES = ("trl", "transformers", "accelerate", "peft", "datasets", "torch")


@dataclass
class SelfPlaySetup:
    """
    A run's settled inputs.

    Args:
        args ([`SPINConfig`]): With every default filled in that follows from the data.
        model_name (`str`): Hub id or folder of the base model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's.
        train_dataset, eval_dataset ([`~datasets.Dataset`]): Token ids, see [`rendering.TokenizedData`].
        params ([`SamplingParams`]): How the opponent answers.
        choice ([`SamplerChoice`]): Which sampler, and why.
        publication ([`Publication`]): In which form opponents are published.
        context_length (`int`): Tokens that the model can hold.
        vocab_size (`int`, *optional*): Number of token ids that the model has, where its configuration says so.
        base_is_opponent (`bool`): Whether the first opponent is the base model as the server has it.
        api_key (`str`, *optional*): The server's.
        adapter (`dict[str, Any]`, *optional*): Configuration of the adapter that is trained.
        quantization (`dict[str, Any]`, *optional*): Configuration of the base model's.
        data_report (`dict[str, Any]`): The training data's format, and how many rows were left out for which reason.
        invalid_rows (`list[dict]`): Which rows were left out as invalid, and why.
        rewards ([`RewardFunctions`], *optional*): The user's reward functions.
        preferences ([`~datasets.Dataset`], *optional*): The user's preference pairs, see [`PreparedPreferences`].
        serves_dequantized (`bool`): Whether the managed server gets the policy's base, its 4-bit weights written out.
        is_quantized_on_its_own (`bool`): Whether a server plays on base weights that the policy has quantized only.
    """

    args: SPINConfig
    model_name: str
    tokenizer: PreTrainedTokenizerBase
    train_dataset: Dataset
    eval_dataset: Dataset | None
    params: SamplingParams
    choice: SamplerChoice
    publication: Publication
    context_length: int
    vocab_size: int | None
    base_is_opponent: bool
    api_key: str | None = field(repr=False)
    adapter: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None
    data_report: dict[str, Any] = field(default_factory=dict)
    invalid_rows: list[dict[str, Any]] = field(default_factory=list)
    rewards: RewardFunctions | None = None
    preferences: Dataset | None = None
    num_dropped: int = 0
    serves_dequantized: bool = False
    is_quantized_on_its_own: bool = False
    sampler_host: SamplerHost = field(init=False)

    def __post_init__(self):
        store = IterationStore(self.args.output_dir)
        self.sampler_host = SamplerHost(
            self.args,
            self.choice,
            self.model_name,
            self.publication.lora_rank,
            self.api_key,
            log_path=store.server_log,
            served_base=store.served_base if self.serves_dequantized else None,
        )

    @classmethod
    def prepare(
        cls,
        model: "str | PreTrainedModel | PeftModel",
        args: SPINConfig | None,
        train_dataset: Dataset | None,
        eval_dataset: Dataset | None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
        peft_config: "PeftConfig | None",
        quantization_config: "BitsAndBytesConfig | None" = None,
        reward_funcs: Any = None,
        preference_dataset: Dataset | None = None,
    ) -> "SelfPlaySetup":
        """Check and settle everything; see [`SPINTrainer`] for the arguments and errors."""
        check_model(model)
        check_peft_config(peft_config)
        if not isinstance(model, str):
            check_trainable(model, peft_config)
        model_name = model if isinstance(model, str) else get_config_model_id(model.config)
        args = _check_args(args, model_name)
        rewards = check_rewards(reward_funcs, args.pairing, args.reward_weights)
        on_main_process(lambda: check_writable(Path(args.output_dir).absolute()))
        check_dataset(train_dataset, "train_dataset", args.prompt_column, args.completion_column)
        if eval_dataset is not None:
            check_dataset(eval_dataset, "eval_dataset", args.prompt_column, args.completion_column)
        if preference_dataset is not None:
            check_preference_dataset(preference_dataset, args.loss_type)
        choice = choose_sampler(args.use_vllm, args.vllm_mode, args.vllm_server_base_url, can_serve())
        PartialState().print(str(choice))
        if choice.mode == "in-process":
            check_generation_kwargs(args.generation_kwargs)
        config = model_config(model, args)
        sharding = Sharding.of(args)
        quantization = find_quantization(model, args, quantization_config, config)
        check_turns(args, choice.mode, sharding, quantization)
        check_trains_adapter(quantization, adapter_config(model, peft_config) is not None)
        publication = plan_publication(
            model, peft_config, choice.mode != "in-process", quantization is not None, sharding
        )
        if choice.mode == "managed":
            serve_command(model_name, lora_rank=publication.lora_rank)  # refuses now what it would refuse then
        writes_base = serves_dequantized(quantization, choice.mode, sharding)
        if choice.mode == "managed" and not (writes_base or isinstance(model, str) or os.path.isdir(model_name)):
            raise ValueError(
                f"A managed server loads the base model itself, but the model passed comes from {model_name!r}, which "
                "is no folder here. Save it with `model.save_pretrained(folder)` and pass `model=folder`."
            )
        config = config.get_text_config()
        context_length = getattr(config, "max_position_embeddings", None) or _NO_LIMIT
        tokenizer = load_tokenizer(processing_class, model_name, args)
        end_ids = end_token_ids(model, tokenizer, args)
        data = main_process_first(lambda: prepare_data(args, tokenizer, end_ids, train_dataset, eval_dataset))
        if args.max_completion_length is None:
            args.max_completion_length = percentile_length(data.train, "chosen_ids", _DEFAULT_LENGTH_PERCENTILE)
        setup = cls(
            args=args,
            model_name=model_name,
            tokenizer=tokenizer,
            train_dataset=data.train,
            eval_dataset=data.eval,
            params=_sampling_params(args, end_ids),
            choice=choice,
            publication=publication,
            context_length=context_length,
            vocab_size=getattr(config, "vocab_size", None),
            base_is_opponent=isinstance(model, str) and starts_as_base(peft_config),
            api_key=_take_api_key(args),
            adapter=describe_adapter(model, peft_config),
            quantization=None if quantization is None else quantization.settings,
            data_report=data.report,
            invalid_rows=data.invalid_rows,
            rewards=rewards,
            serves_dequantized=writes_base,
            is_quantized_on_its_own=differs_on_server(quantization, choice.mode, sharding),
        )
        if preference_dataset is not None:
            setup._prepare_preferences(preference_dataset)
        if rewards is not None:
            setup.data_report["reward_checksum"] = on_main_process(lambda: setup._try_rewards(train_dataset))
        setup._tell()
        setup._fit_to_context(setup.context_length, "the model's context")
        if choice.mode == "server":
            context_length = setup.sampler_host.find_context_length(setup._min_context_length())
            setup._fit_to_context(context_length, "the server's context (`--max-model-len`)")
        elif choice.mode == "managed" and args.vllm_max_model_length is not None:
            setup._fit_to_context(args.vllm_max_model_length, "`vllm_max_model_length`")
        store = IterationStore(args.output_dir)
        if args.resume == "auto" and store.has_run() and not args.overwrite_output_dir:
            on_main_process(lambda: check_same_run(store, setup.describe()))
        on_main_process(lambda: setup._check_disk(model, peft_config))
        return setup

    def build_sampler(self, open_policy: Callable[[], AbstractContextManager[PreTrainedModel]]) -> OpponentSampler:
        """The chosen sampler, not yet open."""
        return self.sampler_host.build(open_policy, self.tokenizer.pad_token_id, self.vocab_size)

    def build_rewards(self, train_dataset: Dataset) -> AnswerRewards | None:
        """What judges answers to the user's `train_dataset`, if there are reward functions."""
        if self.rewards is None:
            return None
        return AnswerRewards(self.rewards, self.tokenizer, train_dataset, self.args.num_generations)

    def _try_rewards(self, train_dataset: Dataset) -> str:
        """See that the functions can judge. Returns the checksum of the columns that they are given."""
        rewards = self.build_rewards(train_dataset)
        rewards.try_on(self.train_dataset)
        return rewards.checksum(numbers(self.train_dataset, "source_row"))

    def write_served_base(self, policy: PreTrainedModel) -> None:
        """Write the quantized policy's base model in plain numbers, where a managed server is to serve it so."""
        if (folder := self.sampler_host.served_base) is not None:
            on_main_process(lambda: write_directory(folder, lambda path: self._write_base(policy, path)))

    def open_sampler(self, sampler: OpponentSampler) -> None:
        """Start the managed server, if there is one, and connect every process to the server."""
        self.sampler_host.open(sampler, self._min_context_length(), self._longest_sequence())

    def server_rest(self, sampler: OpponentSampler) -> ServerRest | None:
        """How the managed server rests, on the process that has started it."""
        return self.sampler_host.rest(sampler)

    def close_sampler(self, sampler: OpponentSampler) -> None:
        self.sampler_host.close(sampler)

    @property
    def managed_server(self) -> ManagedServer | None:
        return self.sampler_host.managed_server

    def _write_base(self, policy: PreTrainedModel, path: Path) -> None:
        save_base(policy, str(path))
        self.tokenizer.save_pretrained(path)

    def _tell(self) -> None:
        for caveat in sampling_caveats(self.args.loss_type, vars(self.args)):
            logger.warning(caveat)
        if message := str(self.publication):
            PartialState().print(message)
        if self.is_quantized_on_its_own:
            logger.warning(
                "The policy's base model is quantized, the server's is not (unless you quantize it alike): opponents "
                "answer with slightly other probabilities than the policy has. The check of each opponent allows for "
                "the difference that the first one shows. With `vllm_mode='managed'` and 4 bits, the server gets the "
                "very numbers that the policy computes with."
            )

    def describe(self) -> dict[str, Any]:
        """What this run depends on, for `self_play.json`. Holds no secret."""
        args = self.args
        return {
            "model": self.model_name,
            "adapter": self.adapter,
            "quantization": self.quantization,
            "reward_functions": None if self.rewards is None else self.rewards.names,
            "sampler": {"mode": self.choice.mode, "reason": self.choice.reason},
            "config": args.to_dict(),
            "changed_settings": changed_settings(args),
            "training": {
                "total_train_batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
                "sharding": None if (sharding := Sharding.of(args)) is None else sharding.engine,
                **({"pairs_per_forward": args.pairs_per_forward} if depends_on_batch(args.loss_type) else {}),
            },
            "data": {
                **self.data_report,
                "train_checksum": dataset_checksum(self.train_dataset),
                "eval_checksum": None if self.eval_dataset is None else dataset_checksum(self.eval_dataset),
                "num_train_rows": len(self.train_dataset),
                "num_dropped_rows": self.num_dropped,
                "num_eval_rows": 0 if self.eval_dataset is None else len(self.eval_dataset),
            },
            "versions": {"spin_trl": __version__, **{name: version(name) for name in _RECORDED_PACKAGES}},
        }

    def _check_disk(self, model: "str | PreTrainedModel | PeftModel", peft_config: "PeftConfig | None") -> None:
        try:
            if isinstance(model, str) or peft_config is not None:
                model = empty_policy(model_config(model, self.args), self.args, peft_config)
            sizes = weight_sizes(model, merged=self.publication.kind == "merged")
        except Exception as error:  # a model that cannot be made empty must not keep the run from being played
            logger.warning(f"How much the run will write is not known: {type(error).__name__}: {error}")
            return
        saves_opponents, evaluates = self.choice.mode != "in-process", self.eval_dataset is not None
        num_opponents = num_saved_opponents(self.args, saves_opponents, self.base_is_opponent, evaluates)
        check_footprint(self.args, sizes, num_opponents, self.serves_dequantized, PartialState().print, logger.warning)

    def _prepare_preferences(self, dataset: Dataset) -> None:
        end_ids = self.params.end_token_ids
        prepared = main_process_first(
            lambda: prepare_preferences(self.args, self.tokenizer, end_ids, dataset, self.context_length)
        )
        self.preferences = prepared.dataset
        self.data_report |= prepared.report
        self.invalid_rows += prepared.invalid_rows

    def _fit_to_context(self, context_length: int, source: str) -> None:
        """Drop prompts that leave no room for a single token, in the context or in `max_length`."""
        max_length = self.args.max_length
        if max_length is not None and max_length <= context_length:
            context_length, source = max_length, "`max_length`"
        reason = f"{source} ({context_length} tokens)"

        def drop() -> int:
            self.train_dataset, num_dropped = drop_long_prompts(self.train_dataset, context_length - 1, reason)
            if self.eval_dataset is not None:
                self.eval_dataset, num_dropped_eval = drop_long_prompts(self.eval_dataset, context_length - 1, reason)
                num_dropped += num_dropped_eval
            return num_dropped

        num_dropped = main_process_first(drop)
        self.num_dropped += num_dropped
        if num_dropped > 0:
            logger.warning(f"Dropped {num_dropped} row(s) whose prompt leaves no room for an answer in {reason}.")

    def _datasets(self) -> list[Dataset]:
        return [self.train_dataset] if self.eval_dataset is None else [self.train_dataset, self.eval_dataset]

    def _min_context_length(self) -> int:
        return 1 + min(percentile_length(dataset, "prompt_ids", 0) for dataset in self._datasets())

    def _longest_sequence(self) -> int:
        longest_prompt = max(percentile_length(dataset, "prompt_ids", 100) for dataset in self._datasets())
        return min(self.context_length, longest_prompt + self.args.max_completion_length)


def _check_args(args: SPINConfig | None, model_name: str) -> SPINConfig:
    if args is None:
        return SPINConfig(f"{model_name.split('/')[-1]}-SPIN")
    if not isinstance(args, SPINConfig):
        raise TypeError(
            f"`args` must be a `SPINConfig`, got `{type(args).__name__}`. Write `SPINConfig(...)`, which takes every "
            "field of `DPOConfig`."
        )
    if args.eval_strategy != "no":
        raise ValueError(
            f"`eval_strategy={args.eval_strategy.value!r}` evaluates within an iteration, which is not supported: "
            "every opponent and the final policy are evaluated as soon as an `eval_dataset` is given. Leave "
            "`eval_strategy` unset."
        )
    return args


def _take_api_key(args: SPINConfig) -> str | None:
    """The key leaves the arguments, which Trainer pickles into every checkpoint."""
    key, args.vllm_api_key = args.vllm_api_key or os.environ.get("VLLM_API_KEY"), None
    return key


def _sampling_params(args: SPINConfig, end_token_ids: tuple[int, ...]) -> SamplingParams:
    return SamplingParams(
        max_completion_length=args.max_completion_length,
        end_token_ids=end_token_ids,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        extra=args.generation_kwargs or {},
    )
