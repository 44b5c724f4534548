"""The table of what users get wrong: each row is what they write, and words that the refusal must have in it.

The words name what was found, what was expected and what to do. All of it is refused before a model is loaded: the
folder that stands for the model here has no weights.
"""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import load_recipe, read_rows
from datasets import Dataset, DatasetDict
from fault_server import FakeVLLM
from peft import LoraConfig, PromptTuningConfig
from tiny_tokenizers import byte_tokenizer, letter_tokenizer
from torch.nn import Linear
from torch.optim import SGD, Adagrad
from torch.optim.lr_scheduler import ConstantLR
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, EarlyStoppingCallback, LlamaConfig
from trl import DPOConfig, ModelConfig, TrlParser

from spin_trl import SPINConfig, SPINTrainer
from spin_trl.generation.sampler import SamplerError


NAN = float("nan")
URL, UNUSED = "http://localhost:8000", "http://127.0.0.1:9"
SERVER = {"use_vllm": None, "vllm_server_base_url": UNUSED}
MANAGED = {"use_vllm": True}


def table(*rows: tuple) -> pytest.MarkDecorator:
    """Rows of what is given, perhaps the error's type (by default `ValueError`), and words that must be in it."""
    split = [(given, rest if isinstance(rest[0], type) else (ValueError, *rest)) for given, *rest in rows]
    # Without addresses of objects, which are others in each process that runs tests.
    ids = [" ".join(re.sub(r" (object )?at 0x\w+", "", repr(row[0])).split())[:60] for row in rows]
    return pytest.mark.parametrize(("given", "refusal"), split, ids=ids)


def refused(refusal: tuple, function: Any, *args, **kwargs) -> None:
    """Assert that the call fails with this type, and a message that has all the words."""
    error, *words = refusal
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    message = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    missing = [fragment for fragment in words if fragment not in message]
    assert not missing, f"{missing} not in: {message}"


@pytest.fixture(scope="session")
def weightless(tmp_path_factory, tokenizer) -> str:
    """Folder of a model of which everything is there but the weights."""
    folder = tmp_path_factory.mktemp("models") / "weightless"
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def play(weightless, make_config, train_dataset):
    """Build a trainer; `config` holds fields of the configuration, the rest are arguments of the trainer."""

    def build(config: dict | None = None, **arguments) -> SPINTrainer:
        defaults = {"model": weightless, "args": make_config(**(config or {})), "train_dataset": train_dataset}
        return SPINTrainer(**{**defaults, **arguments})

    return build


def test_good_input_gets_as_far_as_the_weights_which_are_missing(play):
    with pytest.raises(OSError, match="no file named model.safetensors"):
        play()


# Configuration

AT_LEAST = {
    **dict.fromkeys(("num_iterations", "epochs_per_iteration", "num_generations", "num_opponents"), 1),
    **dict.fromkeys(("max_completion_length", "per_device_generation_batch_size", "per_device_train_batch_size"), 1),
    **dict.fromkeys(("gradient_accumulation_steps",), 1),
    **dict.fromkeys(("num_history_iterations", "top_k", "seed"), 0),
    **dict.fromkeys(("max_length",), 2),
}


@pytest.mark.parametrize(("field", "least"), AT_LEAST.items())
def test_whole_number_that_is_too_small_is_refused(field, least, make_config):
    words = f"`{field}` must be at least {least}", f"got {least - 1}", "Leave it unset"
    refused((ValueError, *words), make_config, **{field: least - 1})


@table(
    # whole numbers and numbers
    ({"num_iterations": "3"}, "`num_iterations` must be a whole number", "got '3' (`str`)", "Leave it unset"),
    ({"num_train_epochs": 3.0}, "is set to 3.0", "`num_iterations` (3) times `epochs_per_", "Set those two instead"),
    ({"temperature": -0.7}, "`temperature` must be at least 0", "got -0.7", "Leave it unset for the default, 1.0"),
    ({"temperature": NAN}, "`temperature` must be a finite number", "got nan", "Leave it unset"),
    ({"reference_mixture_alpha": -0.1}, "`reference_mixture_alpha` must be in [0, 1]", "got -0.1", "the default, 0.0"),
    ({"reference_mixture_alpha": True}, "must be a finite number", "got True (`bool`)"),
    ({"top_p": 95}, "`top_p` must be in (0, 1]", "got 95", "Use 1.0 to consider all"),
    ({"repetition_penalty": 0.0}, "`repetition_penalty` must be positive", "got 0.0", "Use 1.0 for none"),
    ({"vllm_gpu_memory_utilization": 30}, "must be in (0, 1]", "got 30", "such as 0.3 for 30 %"),
    ({"vllm_server_timeout": 0}, "`vllm_server_timeout` must be a positive number of seconds", "got 0"),
    ({"publish_check_tolerance": 0}, "must be positive", "got 0", "`publish_check_tolerance=None`"),
    ({"label_smoothing": 0.7}, "`label_smoothing` must be in [0, 0.5)", "got 0.7", "Leave it unset"),
    # one for each iteration
    ({"beta": 0.0}, "`beta` must be positive", "got 0.0", "Give a positive number"),
    ({"beta": -0.1}, "`beta` must be positive", "got -0.1", "Give a positive number"),
    ({"beta": [0.1, 0.2]}, "`beta` has 2 values ([0.1, 0.2])", "`num_iterations` is 3", "one for each"),
    ({"learning_rate": "5e-7e"}, "`learning_rate` must be a number, or a list", "got '5e-7e'", "such as 5.0e-7"),
    ({"learning_rate": [1e-6, NAN, 1e-7]}, "`learning_rate` must be a number", "got nan", "such as 5.0e-7"),
    ({"learning_rate": [1e-6, 0, 1e-6]}, "`learning_rate` must be positive"),
    # dicts and texts
    ({"generation_kwargs": "typical_p=0.9"}, "must be a dict or JSON of one", "'typical_p=0.9'", "Write it such as"),
    ({"generation_kwargs": ["typical_p"]}, "must be a dict or JSON of one", "['typical_p'] (`list`)", "0.9}"),
    ({"generation_kwargs": {"max_tokens": 64}}, "has 'max_tokens'", "self-play sets itself", "`max_completion_length`"),
    ({"prompt_column": "", "completion_column": "b"}, "must be the name of a column", "got ''", "leave both unset"),
    ({"prompt_column": "a"}, "`prompt_column='a'` and `completion_column=None`", "Set both"),
    ({"output_dir": ""}, "`output_dir` must be the path of a directory", "got ''", "Name the one"),
    # choices
    ({"train_on_turns": "first"}, "`train_on_turns` must be one of ['last', 'all']", "got 'first'"),
    ({"pairing": "best"}, "`pairing` must be one of", "'best_of', 'reward_ranked'", "got 'best'"),
    # what self-play sets itself
    ({"precompute_ref_log_probs": False}, "`precompute_ref_log_probs=False` is not possible", "unset"),
    ({"sync_ref_model": True}, "`sync_ref_model=True` is not possible", "Leave it unset"),
    ({"auto_find_batch_size": True}, "`auto_find_batch_size=True` would", "`per_device_train_batch_size` to what fits"),
    ({"eval_on_start": True}, "`eval_on_start=True` comes before", "Leave it unset"),
    ({"load_best_model_at_end": True}, "needs a metric", "`metric_for_best_model`"),
    # rewards
    ({"pairing": "reward_ranked"}, "`num_generations` is 1", "Set it to 2 or more"),
    ({"pairing": "best_of", "loss_type": "space"}, "`loss_type='space'` contradicts `pairing='best_of'`", "Leave"),
    ({"reward_weights": [0.0, 0.0]}, "`reward_weights` must be a list of finite numbers, not all of them 0"),
    ({"reward_weights": 1.0}, "`reward_weights` must be a list"),
    # servers
    ({**SERVER, "use_vllm": False}, f"`vllm_server_base_url='{UNUSED}'`", "contradicts", "Leave `use_vllm` unset"),
    ({**SERVER, "vllm_server_base_url": []}, "`vllm_server_base_url` must be the address", "got []", "leave it unset"),
    ({**SERVER, "vllm_server_base_url": [URL, 8001]}, "list of at least one", "8001", f"such as '{URL}'"),
    ({**SERVER, "vllm_server_base_url": [URL, f"{URL}/v1/"]}, "more than once", "Name every server once"),
    ({**MANAGED, "vllm_server_args": "--max-num-seqs 64 --host 0.0.0.0"}, "'--host'", "Unix socket", "Leave it out"),
    ({**MANAGED, "vllm_server_args": "--api_key=sk-123"}, "has '--api_key", "It needs none", "Leave it out"),
    ({**MANAGED, "vllm_server_args": "--chat-template 'a"}, '"--chat-template \'a"', "close every quotation mark"),
)
def test_configuration_is_refused(given, refusal, make_config):
    refused(refusal, make_config, **given)


@table(
    ({"loss_type": "spin"}, "unknown value(s) ['spin']", "SPIN's paper is 'sigmoid'", "Use one or several of"),
    ({"loss_type": []}, "`loss_type` is empty", "at least one loss is needed", "Leave it unset"),
    ({"loss_weights": [1.0, 1.0]}, "`loss_weights` has 2 value(s)", "`loss_type` names 1", "one weight for each loss"),
    ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, NAN]}, "of at least 0", "got [1.0, nan]", "Leave out"),
    ({"loss_type": "space", "ld_alpha": 0.5}, "contradicts `ld_alpha=0.5`", "`ld_alpha` unset"),
    ({"loss_type": "space", "use_weighting": True}, "contradicts `use_weighting=True`", "`use_weighting` unset"),
    ({"loss_type": "space", "space_mu": 0.0}, "`space_mu` must be positive, got 0.0"),
    ({"loss_type": "space", "space_mu": 2.5, "num_generations": 2}, "at most `num_generations`", "which is 2, got 2.5"),
    ({"space_mu": 0.5}, "`space_mu=0.5` belongs to the loss 'space'", "['sigmoid']", "Add 'space' to `loss_type`"),
    ({"loss_type": "space", "t_spin_beta": 0.2}, "`t_spin_beta=0.2` belongs to the loss 't_spin'", "unset"),
    ({"loss_type": "t_spin", "t_spin_alpha": 0.0}, "`t_spin_alpha` must be positive, got 0.0", "default, 1.0"),
    ({"loss_type": "t_spin", "t_spin_beta": -0.1}, "`t_spin_beta` must be at least 0, got -0.1", "default, 0.1"),
    ({"loss_type": "iris", "iris_alpha": 1.0}, "`iris_alpha` must be positive and other than 1", "0.99"),
    ({"loss_type": "iris", "per_device_train_batch_size": 1}, "makes that a single pair", "Raise it"),
    ({"loss_type": "space", "identical_pairs": "drop"}, "contradicts `identical_pairs='drop'`", "unset"),
    ({"loss_type": "iris", "train_sampling_strategy": "group_by_length"}, "contradicts `train_sampling_", "unset"),
    ({"loss_type": "space", "num_opponents": 2}, "contradicts `num_opponents=2`", "`num_opponents` unset"),
)
def test_loss_is_refused(given, refusal, make_config):
    refused(refusal, make_config, **given)


# Data

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello."}
GPT = {"role": "gpt", "content": "Hello."}
PARTS = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
GOOD = {"prompt": "a", "completion": "B"}
SHARE_GPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
NAMED = {"prompt_column": "instruction+input", "completion_column": "output"}


def rows(*given: dict) -> Dataset:
    return Dataset.from_list(list(given))


@table(
    (None, TypeError, "got `NoneType`", "must be a `datasets.Dataset`", "Load one"),
    (DatasetDict(train=rows(GOOD), test=rows(GOOD)), TypeError, "got `DatasetDict`", "splits: ['test', 'train']"),
    ([GOOD], TypeError, "got `list`", "must be a `datasets.Dataset`", "`Dataset.from_list("),
    ("a.jsonl", TypeError, "got `str`", "must be a `datasets.Dataset`", "`datasets.load_dataset('json'"),
    (rows(GOOD).to_iterable_dataset(), TypeError, "`IterableDataset`", "all prompts anew", "without `streaming=True`"),
    (rows(GOOD).select([]), "is empty", "at least one row", "See whether the file or the split"),
    (rows({"promt": "a", "completion": "B"}), "['promt', 'completion']", "Is 'promt' a misspelling of 'prompt'?"),
    (rows({"conversations": SHARE_GPT}), "['conversations']", "`messages`, a conversation", "rename_columns"),
    (rows({"prompt": "a", "rejected": "b"}), "['prompt', 'rejected']", "`prompt` and `completion`", "`prompt_column`"),
    (rows({**GOOD, "images": "x.png"}), "['images']", "prompts go to the opponent as token ids", "Use a text dataset"),
)
@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_dataset_is_refused(given, refusal, name, play):
    if name == "eval_dataset" and given is None:
        return
    refused((*refusal, f"`{name}`"), play, **{name: given})


# A row: what stands in it beside "Row 0", which names it, and the way to leave it out.
@table(
    ({"prompt": [1, 2], "completion": [3]}, "`prompt` must be text or a list of messages", "`int`", "the text itself"),
    ({"prompt": "a", "completion": 4}, "`completion` must be text", "found `int`", "Convert the column to text"),
    ({"prompt": None, "completion": "B"}, "`prompt` must be text or a list of messages, found `NoneType`", "Fill"),
    ({"prompt": "a", "completion": " "}, "`completion` is empty", "Every row needs a prompt", "remove the row"),
    ({"prompt": [{"content": "a"}], "completion": [ASSISTANT]}, "found a list of `dict` with the keys ['content']"),
    ({"prompt": "Hi", "completion": [ASSISTANT]}, "mixed formats: `prompt` is text and `completion` is a list", "both"),
    ({"prompt": [USER], "completion": [USER]}, "exactly one assistant message", "roles ['user']", "Move earlier"),
    ({"prompt": [USER, ASSISTANT], "completion": [ASSISTANT]}, "ends on the role 'assistant'", "Join two answers"),
    ({"messages": SHARE_GPT}, "keys ['from', 'value']", "a non-empty list of messages", "{'role': ..., 'content'"),
    ({"messages": json.dumps([USER])}, "`messages` must be a non-empty list of messages, found text", "json.loads"),
    ({"real": []}, "`real` must be a non-empty list of messages, found an empty list", "Fill the cell"),
    ({"messages": [USER]}, "ends on the role 'user'", "must be the assistant's", "Remove what follows the last"),
    ({"messages": [USER, GPT]}, "ends on the role 'gpt'", "must be the assistant's", "rename the role to 'assistant'"),
    ({"messages": [ASSISTANT]}, "the prompt of `messages` is empty", "Every row needs a prompt", "remove the row"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "the ground truth of `messages` is empty"),
    ({"messages": [USER, {"role": "assistant", "content": ""}, USER, ASSISTANT]}, "message 1", "is empty. Remove it"),
    ({"messages": [PARTS, ASSISTANT | {"content": []}]}, "`content` is a list of `dict`", "Join the text parts"),
    ({"messages": [USER, ASSISTANT], "tools": "get_weather"}, "`tools` is text but not JSON", "`json.dumps`"),
    ({"chosen": "a B", "rejected": "a C"}, "`chosen` is text without a `prompt`", "trl.extract_prompt"),
    ({"prompt": [ASSISTANT], "chosen": [USER, ASSISTANT]}, "does not begin with `prompt`", "Make the two agree"),
    ({"instruction": "a", "input": 3, "output": "x"}, "`input` must be text to be joined, found `int`"),
)
def test_row_is_refused(given, refusal, play):
    tokenizer = byte_tokenizer("<|im_end|>", "qwen2_5", ["<|im_start|>"])
    config = NAMED if "output" in given else {}
    words = *refusal, "Row 0", "`skip_invalid_rows=True`", "In `train_dataset`"
    refused(words, play, config, train_dataset=rows(given), processing_class=tokenizer)


def test_row_of_the_evaluation_data_is_refused_by_its_number_and_dataset(play):
    words = "Row 1", "In `eval_dataset`."
    refused((ValueError, *words), play, eval_dataset=rows(GOOD, {"prompt": "", "completion": "B"}))


# The rest of a run

CONVERSATIONS = rows({"messages": [USER, ASSISTANT]})
QUANTIZED = BitsAndBytesConfig(load_in_8bit=True)
PARAMETERS = list(Linear(1, 1).parameters())
SGD_AND_SCHEDULER = (None, ConstantLR(SGD(PARAMETERS, lr=1)))
LORA = {"r": 4, "target_modules": "all-linear"}
OFFLOADS = {**MANAGED, "offload_policy_during_generation": True}
LENGTHS = rows({"prompt": "a" * 70, "completion": "B"}, {"prompt": "b" * 80, "completion": "B"})
PREFERENCES = rows({"prompt": "a", "chosen": "b", "rejected": "c"})
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "nll"}
MERGES = {"merge_adapter_at_end": True}
ROLLBACK = {"on_collapse": "rollback"}


def length(completions, **kwargs):
    return [float(len(text)) for text in completions]


def one_for_all(completions, **kwargs):
    return [0.0]


def for_other_data(completions, answer, **kwargs):
    return [0.0] * len(completions)


@table(
    # data
    (
        {"config": {"prompt_column": "qestion", "completion_column": "a"}, "train_dataset": rows({"question": "a"})},
        *("['question']", "`prompt_column='qestion'`", "Is 'question' a misspelling of 'qestion'?"),
    ),
    ({"train_dataset": CONVERSATIONS}, "no chat template", "is conversational", "Set `tokenizer.chat_template`"),
    ({"train_dataset": LENGTHS}, "All 2 prompts are too long", "the shortest has 7", "shorten the prompts"),
    ({"config": {"max_length": 3}}, "the shortest has 4 tokens", "leaves room for at most 2", "Raise that limit"),
    ({"preference_dataset": [GOOD]}, TypeError, "`preference_dataset` must be a `datasets.Dataset`", "got `list`"),
    ({"preference_dataset": rows(GOOD)}, "['prompt', 'completion'], but lacks ['chosen', 'rejected']", "Rename them"),
    ({"preference_dataset": PREFERENCES.select([])}, "`preference_dataset` is empty", "See whether the file"),
    (
        {"preference_dataset": PREFERENCES, "config": {"loss_type": ["sft", "space"]}},
        *("`loss_type='space'` contradicts `preference_dataset`", "Leave `preference_dataset` unset"),
    ),
    # tokenizer and model
    ({"processing_class": byte_tokenizer(None)}, "no end token", "no answer could ever end", "`tokenizer.eos_token`"),
    (
        {"train_dataset": rows({"prompt": "a", "completion": "xyz"}), "processing_class": letter_tokenizer()},
        *("Row 0: the tokenizer makes no tokens of `completion`", "at least one is needed", "`processing_class`"),
    ),
    ({"processing_class": "gpt2"}, TypeError, "got 'gpt2' (`str`)", "`AutoTokenizer.from_pretrained(...)`"),
    ({"model": Path("models/a")}, TypeError, "(`PosixPath`)", "must be a hub id, a folder", "`str(path)`"),
    ({"model": AutoModelForCausalLM}, TypeError, "AutoModelForCausalLM", "`Class.from_pretrained(...)`"),
    ({"model": "/no/such/model"}, "'/no/such/model', where there is nothing", "expected a folder", "Correct the path"),
    ({"model": "Qwn/Qwen2.5"}, "'Qwn/Qwen2.5' cannot be read", "what `save_pretrained` writes", "see its spelling"),
    ({"compute_metrics": len}, "`compute_metrics` is never called", "Pass `compute_generation_metrics`"),
    ({"callbacks": [EarlyStoppingCallback()]}, "`EarlyStoppingCallback` counts", "`stop_when_converged=True`"),
    ({"trian_dataset": None}, TypeError, "unexpected keyword argument 'trian_dataset'"),
    ({"ref_model": object()}, "`ref_model` is not used", "the reference is the opponent", "Leave it out"),
    # configuration
    ({"args": DPOConfig("x", use_cpu=True, bf16=False)}, TypeError, "must be a `SPINConfig`", "got `DPOConfig`"),
    ({"config": {"eval_strategy": "steps"}}, "`eval_strategy='steps'`", "not supported", "Leave `eval_strategy` unset"),
    (
        {"config": {"generation_kwargs": {"stop_strings": ["a"]}}},
        "has 'stop_strings'",
        "token ids alone",
        "Leave it out",
    ),
    ({"config": {"generation_kwargs": {"typicl_p": 0.9}}}, "['typicl_p']", "`GenerationConfig`", "Correct or remove"),
    # adapters
    ({"peft_config": {"r": 8}}, TypeError, "got {'r': 8} (`dict`)", "must be a `PeftConfig`", "Write `LoraConfig("),
    ({"peft_config": LoraConfig(init_lora_weights="pissa_niter_4")}, "'pissa_niter_4'", "another base", "to 'pissa'"),
    ({"peft_config": LoraConfig(inference_mode=True)}, "`inference_mode=True`", "Set `inference_mode=False`"),
    (
        {"config": SERVER, "peft_config": LoraConfig(alora_invocation_tokens=[1])},
        *("`alora_invocation_tokens=[1]`", "Use a plain `LoraConfig`", "set `use_vllm=False`"),
    ),
    (
        {"config": SERVER, "peft_config": PromptTuningConfig(num_virtual_tokens=4)},
        *("`peft_type='PROMPT_TUNING'`", "Use a plain `LoraConfig`", "set `use_vllm=False`"),
    ),
    (
        {"config": SERVER, "peft_config": LoraConfig(layer_replication=[[0, 2]])},
        *("`layer_replication=[[0, 2]]`", "Use a plain `LoraConfig`", "set `use_vllm=False`"),
    ),
    ({"config": MANAGED, "peft_config": LoraConfig(r=600)}, "got rank 600", "up to rank 512", "Use a smaller `r`"),
    ({"config": MERGES}, "`merge_adapter_at_end=True`", "there is no adapter", "`peft_config`"),
    (
        {"config": MERGES, "peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)},
        *("`peft_type=PROMPT_TUNING` a learned prompt", "`LoraConfig`"),
    ),
    # evaluation
    ({"eval_dataset": rows(GOOD), "compute_generation_metrics": "f"}, TypeError, "got 'f' (`str`)", "a function"),
    ({"compute_generation_metrics": length}, "answers to `eval_dataset`, and that is None", "Pass an"),
    ({"config": {"metric_for_best_model": "nll"}}, "compares evaluations, but `eval_dataset` is None"),
    (
        {"config": {"metric_for_best_model": "accuracy"}, "eval_dataset": rows(GOOD)},
        *("'accuracy'` is none of the evaluation's metrics: ['nll', 'rewards/chosen'",),
    ),
    # what could not become the policy again
    *(
        (
            {"config": {**MANAGED, **setting}, "eval_dataset": rows(GOOD), "peft_config": lora},
            found,
            next(iter(setting)),
        )
        for setting in (ROLLBACK, BEST)
        for lora, found in (
            (LoraConfig(**LORA, use_dora=True), "vLLM cannot load adapters with `use_dora=True`"),
            (LoraConfig(**LORA, rank_pattern={"q_proj": 8}), "`rank_pattern`"),
        )
    ),
    # optimizer
    ({"optimizers": SGD(PARAMETERS, lr=1)}, TypeError, "SGD", "an optimizer and a scheduler", "`(optimizer, None)`"),
    (
        {"config": {"learning_rate": [1e-6, 1e-7, 1e-8]}, "optimizers": SGD_AND_SCHEDULER},
        *("`learning_rate` has a value for each", "sets the learning rate", "Pass `(optimizer, None)`"),
    ),
    ({"optimizers": (Adagrad(PARAMETERS), None)}, "`Adagrad` passed", "its moments cannot be", "Set `reset_optim"),
    ({"config": {"optim": "adagrad"}}, "`optim='adagrad'`", "`reset_optimizer=False`"),
    # rewards
    ({"reward_funcs": "org/reward-model"}, TypeError, "got 'org/reward-model' (`str`)", "A reward model has to be"),
    ({"reward_funcs": Linear(1, 1)}, TypeError, "got Linear", "(`Linear`)", "A reward model has to be called by"),
    ({"reward_funcs": [length, 3]}, TypeError, "got 3 (`int`)", "Pass one that takes `prompts`"),
    ({"reward_funcs": Dataset}, TypeError, "got <class", "(`type`)", "Pass one that takes `prompts`"),
    ({"config": {"pairing": "best_of"}}, "`pairing='best_of'` chooses by rewards, but no `reward_funcs` are given"),
    ({"config": {"reward_weights": [1.0]}}, "`reward_weights` has 1 value(s)", "there are 0 `reward_funcs`"),
    ({"config": {"reward_weights": [1.0] * 2}, "reward_funcs": length}, "has 2 value(s)", "1 `reward_funcs`"),
    ({"reward_funcs": for_other_data}, TypeError, "answer", "In the reward function `for_other_data`"),
    ({"reward_funcs": one_for_all}, "`one_for_all` returned 1 rewards for 2 completions", "Correct the function"),
    # sleep and offload
    ({"config": {**SERVER, "vllm_sleep": True}}, "started itself", "names one that runs", "leave `vllm_sleep` unset"),
    ({"config": {"vllm_sleep": True}}, "no server generates", "the run has started itself", "Set `use_vllm=True`"),
    ({"config": {**OFFLOADS, "use_vllm": False}}, "in-process generation", "use a vLLM server"),
    (
        {"config": OFFLOADS, "quantization_config": QUANTIZED, "peft_config": LoraConfig(**LORA)},
        *("quantized otherwise", "quantized to 4 bits by bitsandbytes", "lower `vllm_gpu_memory_utilization`"),
    ),
    # quantization
    ({"quantization_config": QUANTIZED}, "quantized weights cannot be trained", "`peft_config`"),
    (
        {"config": MANAGED, "quantization_config": QUANTIZED, "peft_config": LoraConfig(**LORA, use_dora=True)},
        *("`use_dora=True`, and into a quantized base they cannot be merged",),
    ),
)
def test_run_is_refused(given, refusal, play):
    refused(refusal, play, **given)


@table(
    ((OFFLOADS, 2), "FSDP holds", "moves whole tensors", "FSDP's own `offload_params`"),
    ((ROLLBACK, 2), "on_collapse='rollback'", "ZeRO-3 and FSDP"),
    (({"num_opponents": 2}, 2), "`num_opponents=2` loads the opponent", "only shards", "Use a vLLM server"),
    (({}, 1), "version 1 of FSDP", "`fsdp_version: 2`"),
)
def test_run_with_fsdp_is_refused(given, refusal, play, make_config, monkeypatch):
    config, fsdp_version = given
    args = make_config(**config)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", str(fsdp_version))
    refused(refusal, play, args=args)


@table(
    (({"zero_stage": 1}, OFFLOADS), "DeepSpeed ZeRO-1 holds", "moves whole tensors", "own `offload_optimizer`"),
    (({"zero_stage": 3}, BEST), "under ZeRO-3 and FSDP each process holds only shards"),
    (({"deepspeed_config": {"scheduler": {"type": "WarmupLR"}}}, {}), "`scheduler`", "`lr_scheduler_type` and"),
    (({"deepspeed_config": {"optimizer": {"type": "OneBitAdam"}}}, {}), "'OneBitAdam'", "`reset_optimizer=False`"),
    (
        ({"deepspeed_config": {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}}, {}),
        *("NVMe", "`reset_optimizer=False`"),
    ),
)
def test_run_with_deepspeed_is_refused(given, refusal, play, make_config):
    plugin, config = given
    args = make_config(**config)
    args.deepspeed_plugin = SimpleNamespace(**{"zero_stage": 1, "deepspeed_config": {}, **plugin})
    refused(refusal, play, args=args, eval_dataset=rows(GOOD))


def test_quantization_without_its_package_is_refused(play, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = "not installed", "pip install spin_trl[qlora]"
    refused((ValueError, *words), play, quantization_config=QUANTIZED, peft_config=LoraConfig(**LORA))


@table(
    (({}, False), "parameters of `model` are frozen", "training needs some", "`peft_config`"),
    ((MANAGED, True), "which is no folder here", "`model.save_pretrained(folder)`"),
    ((MERGES, True), "no folder and no hub", "save_pretrained"),
)
def test_loaded_model_is_refused(given, refusal, play, tiny_model, tokenizer):
    """It comes from nowhere."""
    config, is_trained = given
    model = AutoModelForCausalLM.from_pretrained(tiny_model).requires_grad_(is_trained)
    model.config._name_or_path = ""
    adapter = LoraConfig(**LORA) if is_trained else None
    refused(refusal, play, config, model=model, processing_class=tokenizer, peft_config=adapter)


@table(
    (("config.json", None), "there is no config.json", "`model.save_pretrained(folder)`", "Correct the path"),
    (("config.json", "{oops"), "configuration", "what `save_pretrained` writes", "Correct `model`"),
    (("config.json", "{}"), "`model_type`", "what `save_pretrained` writes", "Correct `model`"),
    (("tokenizer.json", None), "The tokenizer", "what `save_pretrained` writes", "pass `processing_class`"),
)
def test_folder_of_a_model_is_refused_for_what_it_lacks(weightless, play, tmp_path, given, refusal):
    name, content = given
    shutil.copytree(weightless, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_text(content)
    refused(refusal, play, model=str(tmp_path))


def test_adapter_is_not_merged_into_a_model_that_is_saved_quantised(weightless, play, tmp_path):
    shutil.copytree(weightless, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = "are saved quantised", "`quantization_config`"
    refused((ValueError, *words), play, MERGES, model=str(tmp_path), peft_config=LoraConfig(**LORA))


def test_folder_of_an_adapter_is_refused_as_a_model(play, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    words = "an adapter alone", "expected a folder", "`PeftModel.from_pretrained("
    refused((ValueError, *words), play, model=str(tmp_path))


# Server


def locked(path: str, body: dict | None):
    return (200, "") if path == "/health" else (401, {"error": "Unauthorized"})


def always(status: int, answer: Any):
    return lambda path, body: (status, answer)


OF_OPENAI = {"data": [{"id": "weightless", "object": "model"}]}


@table(
    (locked, "HTTP 401", "It expects another API key", "variable VLLM_API_KEY"),
    (FakeVLLM("org/other"), "serves ['org/other']", "not '/", "spin_trl.serve"),
    (always(200, "<html>It works!</html>"), "<html>It works!</html>", "is no vLLM server", "Correct `vllm_server_base"),
    (always(200, {"models": []}), '{"models": []}', "is no vLLM server", "Correct `vllm_server_base_url`"),
    (always(200, OF_OPENAI), "weightless", "models with `id` and `max_model_len`", "Correct `vllm_server_base_url`"),
    (always(404, "Not Found"), "HTTP 404: Not Found", "Expected is a vLLM server", "correct `vllm_server_base_url`"),
    (FakeVLLM("weightless", adapters=False), "without `--enable-lora`", "load the LoRA adapters", "spin_trl.serve"),
    (FakeVLLM("weightless", context_length=4), "has a context of 4 tokens", "at least 5", "larger `--max-model-len`"),
)
def test_server_is_refused(given, refusal, play, faulty):
    faulty.answer, config = given, {"vllm_server_base_url": faulty.url}
    refused((SamplerError, *refusal[1:]), play, config, peft_config=LoraConfig(target_modules="all-linear"))


@table(
    ("localhost:8000", "'localhost:8000' is no address", "Set `vllm_server_base_url` to one such as 'http://"),
    ("", "'' is no address", "Set `vllm_server_base_url` to one such as 'http://"),
    (["host:8001", UNUSED], "'host:8001' is no address", "Set `vllm_server_base_url` to one such as 'http://"),
    (UNUSED, "Cannot connect to host 127.0.0.1:9", "`vllm_server_timeout`", "Start it with `python"),
)
def test_address_is_refused(given, refusal, play):
    refused((SamplerError, *refusal[1:]), play, {"vllm_server_base_url": given, "vllm_server_timeout": 0.1})


# Run directory


@pytest.mark.parametrize("below", ["", "run"], ids=["a file", "below a file"])
def test_run_directory_that_cannot_be_one_is_refused(play, tmp_path, below):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / below
    words = f"`output_dir` is '{path}'", "is no directory", "Choose a path"
    refused((NotADirectoryError, *words), play, {"output_dir": str(path)})
    assert (tmp_path / "file").read_text() == ""


# The script


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A directory with a good file, and bad ones."""
    good = "".join(json.dumps(row) + "\n" for row in read_rows("accent_train.jsonl", 2))
    (tmp_path / "good.jsonl").write_text(good)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text(good + '{"prompt": "a", "completion": "B"\n' + good)
    (tmp_path / "latin.csv").write_bytes("prompt,completion\na,caf\xe9\n".encode("latin-1"))
    (tmp_path / "broken.parquet").write_text("prompt,completion\n" + good)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text(good)
    (tmp_path / "metrics.py").write_text("def accuracy(prompts, references, generations): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


@table(
    ("num_iteration: 2", "'--num_iteration'", "Unknown arguments from config file", "remove"),
    ("train_file: null", "`train_file=None` and `dataset_name=None`", "either `train_file`", "Set either"),
    ("dataset_name: some/data", "`dataset_name='some/data'`", "either `train_file` (a local file) or", "Set either"),
    (
        "train_file: data.txt",
        "'data.txt', which ends in '.txt'",
        "'.csv', '.json', '.jsonl', '.parquet', '.tsv'",
        "convert",
    ),
    ("train_file: latin.csv", "'latin.csv' cannot be read: byte 23", "is no UTF-8", "Save the file as UTF-8"),
    ("train_file: no.jsonl", "'no.jsonl', which is no file", "Expected an existing file", "Correct the path"),
    ("train_file: empty.jsonl", "'empty.jsonl' is empty", "one JSON object a line", "See what should have written it"),
    ("train_file: broken.jsonl", "line 3 is no JSON", "one JSON object a line", "Correct or remove what is broken"),
    ("train_file: broken.parquet", "Parquet magic bytes not found", "Expected is a Parquet file", "Correct or remove"),
    ("evaluate: true", "`evaluate=True`", "takes a split of `dataset_name`", "Set `eval_file` instead"),
    (
        "train_file: null\ndataset_name: folder\ndataset_train_split: trian",
        *("`dataset_train_split` is 'trian'", "the splits ['train']", "Set it to one"),
    ),
    ("generation_metrics: metrics.py", "got 'metrics.py'", "must be 'file.py:function'", "Correct the path"),
    ("generation_metrics: no.py:f", "got 'no.py:f'", "'file.py:function' with an existing file", "Correct the path"),
    ("generation_metrics: metrics.py:acuracy", "names 'acuracy'", "does not define", "Name one of ['accuracy']"),
    ("reward_funcs: [no.py:f]", "`reward_funcs` must be 'file.py:function' with an existing file, got 'no.py:f'"),
    ("model_name_or_path: null", TypeError, "got None", "must be a hub id, a folder", "Pass a path as"),
)
def test_script_refuses(given, refusal, folder, weightless):
    settings = {"output_dir": "run", "use_cpu": True, "bf16": False, "use_vllm": False, "train_file": "good.jsonl"}
    settings |= {"model_name_or_path": weightless}
    lines = [f"{key}: {json.dumps(value)}" for key, value in settings.items() if f"{key}:" not in given]
    (folder / "config.yaml").write_text("\n".join([*lines, given]))
    spin = load_recipe("spin")

    def run():
        parser = TrlParser((spin.SPINScriptArguments, SPINConfig, ModelConfig))
        spin.main(*parser.parse_args_and_config(["--config", "config.yaml"]))

    refused(refusal, run)
