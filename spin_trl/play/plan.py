"""`Plan`: everything that a run settles before weights are loaded. Knows nothing of training.

Each part is worked out when it is first asked for, and kept. So the checks (`checks.py`) say in which order that is.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from importlib.metadata import version
from typing import Any

from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset
from peft import PeftConfig
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from trl.trainer.utils import get_config_model_id

from ..data.columns import numbers
from ..data.preparation import RunData, prepare_data
from ..data.rewards.functions import RewardFunctions, check_rewards
from ..data.rewards.judged_answers import AnswerRewards
from ..data.token_rows import percentile_length
from ..generation.opening import SamplerChoice, SamplerHost, choose_sampler
from ..generation.sampler import OpponentSampler, SamplingParams
from ..generation.vllm.serve_command import can_serve
from ..objectives.settings import depends_on_batch, sampling_caveats
from ..policy.adapters import adapter_config, starts_as_base
from ..policy.inputs import end_token_ids, load_tokenizer, model_config
from ..policy.published_form import Publication, plan_publication
from ..policy.quantization import Quantization, find_quantization
from ..policy.sharding import Sharding
from ..processes.ranks import main_process_first
from ..run_directory.description import changed_settings
from ..run_directory.store import IterationStore
from ..spin_config import SPINConfig


logger = get_logger(__name__)

_DEFAULT_LENGTH_PERCENTILE = 99
_NO_LIMIT = 1_000_000_000  # tokens
_RECORDED_PACKAGES = ("spin_trl", "trl", "transformers", "accelerate", "peft", "datasets", "torch")


@dataclass(repr=False, eq=False)
class Plan:
    """
    A run's inputs, as passed to [`SPINTrainer`], and what follows from them. Every process asks for the same parts in
    the same order.
    """

    model: Any
    given_args: SPINConfig | None
    train_dataset: Dataset | None
    eval_dataset: Dataset | None = None
    compute_generation_metrics: Callable | None = None
    reward_funcs: Any = None
    preference_dataset: Dataset | None = None
    sampler: OpponentSampler | None = None
    dpo: dict[str, Any] = field(default_factory=dict)  # DPOTrainer's other arguments

    @property
    def peft_config(self) -> Any:
        """Of an adapter that is to be added."""
        return self.dpo.get("peft_config")

    # The settings

    @cached_property
    def args(self) -> SPINConfig:
        """With every default filled in; `max_completion_length` when there is `data`."""
        if self.given_args is None:
            return SPINConfig(f"{self.model_name.split('/')[-1]}-SPIN")
        return self.given_args

    @cached_property
    def rewards(self) -> RewardFunctions | None:
        """The user's reward functions."""
        return check_rewards(self.reward_funcs, self.args.pairing, self.args.reward_weights)

    # The model

    @cached_property
    def model_name(self) -> str:
        """Hub id or folder of the base model."""
        return self.model if isinstance(self.model, str) else get_config_model_id(self.model.config)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's."""
        return model_config(self.model, self.args)

    @property
    def context_length(self) -> int:
        """Tokens that the model can hold."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None) or _NO_LIMIT

    @property
    def vocab_size(self) -> int | None:
        """Number of token ids that the model has, where its configuration says so."""
        return getattr(self.config.get_text_config(), "vocab_size", None)

    @cached_property
    def sharding(self) -> Sharding:
        """What is spread over the processes."""
        return Sharding.of(self.args)

    @cached_property
    def quantization(self) -> Quantization | None:
        """How the base model's weights are quantized."""
        return find_quantization(self.model, self.args, self.dpo.get("quantization_config"), self.config)

    @cached_property
    def adapter(self) -> PeftConfig | None:
        """Configuration of the adapter that is trained, as it is before PEFT fills it in."""
        return deepcopy(adapter_config(self.model, self.peft_config))

    # Who answers

    @cached_property
    def choice(self) -> SamplerChoice:
        """Which sampler, and why."""
        if self.sampler is not None:
            return SamplerChoice("given", f"`sampler` is a `{type(self.sampler).__name__}`")
        args = self.args
        return choose_sampler(args.use_vllm, args.vllm_server_base_urls, can_serve())

    @property
    def reads_checkpoints(self) -> bool:
        """Whether opponents are saved for the sampler."""
        return self.choice.mode != "in-process" if self.sampler is None else self.sampler.reads_checkpoints

    @cached_property
    def publication(self) -> Publication:
        """In which form opponents are published."""
        return plan_publication(self.adapter, self.reads_checkpoints, self.quantization is not None, self.sharding)

    @property
    def base_is_opponent(self) -> bool:
        """Whether the first opponent is the base model as the server has it."""
        return isinstance(self.model, str) and starts_as_base(self.adapter)

    @property
    def serves_dequantized(self) -> bool:
        """Whether the managed server gets the numbers that the policy's 4-bit weights stand for, and plays exactly."""
        is_4bit = self.quantization is not None and self.quantization.is_4bit
        return is_4bit and not self.sharding.spreads_weights and self.choice.mode == "managed"

    @property
    def is_quantized_on_its_own(self) -> bool:
        """Whether a server plays on base weights that the policy alone has quantized."""
        is_own = self.quantization is not None and not self.quantization.of_checkpoint
        return is_own and self.reads_checkpoints and not self.serves_dequantized

    @cached_property
    def sampler_host(self) -> SamplerHost:
        """Opens the sampler."""
        store = IterationStore(self.args.output_dir)
        served_base = store.served_base if self.serves_dequantized else None
        lora_rank = self.publication.lora_rank
        return SamplerHost(self.args, self.choice, self.model_name, lora_rank, store.server_log, served_base)

    # What is played on

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's."""
        return load_tokenizer(self.dpo.get("processing_class"), self.model_name, self.args)

    @cached_property
    def end_token_ids(self) -> tuple[int, ...]:
        """Token ids at which an answer ends."""
        return end_token_ids(self.model, self.tokenizer, self.args)

    @cached_property
    def data(self) -> RunData:
        """Token ids, without prompts that leave no room for an answer in the model, the server or `max_length`."""
        args, tokens = self.args, (self.tokenizer, self.end_token_ids)
        given = self.train_dataset, self.eval_dataset, self.preference_dataset
        day = date.today() if args.overwrite_output_dir else IterationStore(args.output_dir).first_day()
        data = main_process_first(lambda: prepare_data(args, *tokens, *given, self.context_length, day))
        if args.max_completion_length is None:
            args.max_completion_length = percentile_length(data.train, "chosen_ids", _DEFAULT_LENGTH_PERCENTILE)
        self._fit(data, self.context_length, "the model's context")
        if self.choice.mode == "server":
            length = self.sampler_host.find_context_length(data.prompt_length(0) + 1)
            self._fit(data, length, "the server's context (`--max-model-len`)")
        return data

    def _fit(self, data: RunData, length: int, source: str) -> None:
        max_length = self.args.max_length
        if max_length is not None and max_length <= length:
            length, source = max_length, "`max_length`"
        data.fit_to(length, source)

    def expected_pairs(self, iteration: int) -> int:
        """About how many pairs an iteration trains on."""
        args, data = self.args, self.data
        num_new = len(data.train) * (1 if args.pairing == "reward_ranked" else args.num_generations)
        num_preferences = 0 if data.preferences is None else len(data.preferences)
        return num_new * (1 + min(iteration, args.num_history_iterations)) + num_preferences

    @property
    def max_length(self) -> int:
        """Tokens, prompt and answer, that the model holds and training sees."""
        return min(self.context_length, self.args.max_length or self.context_length)

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt with the longest answer that may be given to it."""
        return min(self.context_length, self.data.prompt_length(100) + self.args.max_completion_length)

    @cached_property
    def params(self) -> SamplingParams:
        """How the opponent answers."""
        args = self.args
        return SamplingParams(
            max_completion_length=args.max_completion_length,
            end_token_ids=self.end_token_ids,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            repetition_penalty=args.repetition_penalty,
            extra=args.generation_kwargs or {},
        )

    @cached_property
    def judge(self) -> AnswerRewards | None:
        """What judges answers to `train_dataset`, if there are reward functions."""
        if self.rewards is None:
            return None
        return AnswerRewards(self.rewards, self.tokenizer, self.train_dataset, self.args.num_generations)

    # What is told

    def announce(self) -> None:
        """Tell the user what follows from the settings, where they may not expect it."""
        PartialState().print(str(self.choice))
        for caveat in sampling_caveats(self.args.loss_type, vars(self.args)):
            logger.warning(caveat)
        if message := str(self.publication):
            PartialState().print(message)
        if self.is_quantized_on_its_own:
            logger.warning(
                "The policy's base model is quantized, the server's is not (unless you quantize it alike): opponents "
                "answer with slightly other probabilities than the policy has. The check of each opponent allows for "
                "the difference that the first one shows. With 4 bits and a managed server, that server gets "
                "the very numbers that the policy computes with."
            )

    def describe(self) -> dict[str, Any]:
        """What this run depends on, for `self_play.json`. Called on the main process."""
        args, data = self.args, self.data.describe()
        adapter = {} if self.adapter is None else self.adapter.to_dict()
        if self.judge is not None:
            data["reward_checksum"] = self.judge.checksum(numbers(self.data.train, "source_row"))
        return {
            "model": self.model_name,
            # Sets in an order that does not change.
            "adapter": {k: sorted(v) if isinstance(v, set) else v for k, v in adapter.items()} or None,
            "quantization": None if self.quantization is None else self.quantization.settings,
            "reward_functions": None if self.rewards is None else self.rewards.names,
            "sampler": {"mode": self.choice.mode, "reason": self.choice.reason},
            "config": args.to_dict(),
            "changed_settings": changed_settings(args),
            "training": {
                "total_train_batch_size": args.pairs_per_step,
                "sharding": self.sharding.engine,
                **({"pairs_per_forward": args.pairs_per_forward} if depends_on_batch(args.loss_type) else {}),
            },
            "data": data,
            "versions": {name: version(name) for name in _RECORDED_PACKAGES},
        }
