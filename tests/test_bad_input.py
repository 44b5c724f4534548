"""A catalogue of what users get wrong. Each refusal must name what was found, what was expected, and what to do.

All of it is refused before a model is loaded: the folder that stands for the model here has no weights.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from conftest import load_recipe, read_rows
from datasets import Dataset, DatasetDict
from fault_server import FakeVLLM, FaultyServer
from peft import LoraConfig, PromptTuningConfig
from tiny_tokenizers import byte_tokenizer, letter_tokenizer
from torch.optim import SGD, Adagrad
from torch.optim.lr_scheduler import ConstantLR
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, ModelConfig, TrlParser

from spin_trl import SPINConfig, SPINTrainer
from spin_trl.generation.sampler import SamplerError


UNUSED = "http://127.0.0.1:9"
SERVER = {"use_vllm": None, "vllm_server_base_url": UNUSED}
MANAGED = {"use_vllm": None, "vllm_mode": "managed"}


class Refusal(NamedTuple):
    """Three fragments of an error's message, and its type."""

    found: str
    expected: str
    remedy: str
    error: type[Exception] = ValueError


def refused(refusal: Refusal, function: Any, *args, **kwargs) -> None:
    """Assert that the call fails with exactly this type, and a message that names all three."""
    with pytest.raises(refusal.error) as caught:
        function(*args, **kwargs)
    message = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    missing = [fragment for fragment in refusal[:3] if fragment not in message]
    assert not missing, f"{missing} not in: {message}"


def catalogue(cases: dict[str, tuple]) -> pytest.MarkDecorator:
    """Name -> (input, refusal) as the parameters of a test."""
    return pytest.mark.parametrize(("given", "refusal"), cases.values(), ids=cases)


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

NAN = float("nan")
CONFIGURATIONS = {
    "number of iterations as text": (
        {"num_iterations": "3"},
        Refusal("got '3' (`str`)", "`num_iterations` must be a whole number", "Leave it unset for the default, 3"),
    ),
    "half an iteration": (
        {"num_iterations": 2.5},
        Refusal("got 2.5", "`num_iterations` must be a whole number", "Leave it unset"),
    ),
    "no iteration": (
        {"num_iterations": 0},
        Refusal("got 0", "`num_iterations` must be at least 1", "Leave it unset for the default, 3"),
    ),
    "number of epochs": (
        {"num_train_epochs": 2},
        Refusal("is set to 2", "`num_iterations` (3) times `epochs_per_iteration` (1)", "Set those two instead"),
    ),
    "negative temperature": (
        {"temperature": -0.7},
        Refusal("got -0.7", "`temperature` must be at least 0", "Leave it unset for the default, 1.0"),
    ),
    "temperature that is not a number": (
        {"temperature": NAN},
        Refusal("got nan", "`temperature` must be a finite number", "Leave it unset"),
    ),
    "infinite temperature of the evaluation": (
        {"eval_temperature": float("inf")},
        Refusal("got inf", "`eval_temperature` must be a finite number", "Leave it unset for the default, 0.0"),
    ),
    "top_p in percent": ({"top_p": 95}, Refusal("got 95", "`top_p` must be in (0, 1]", "Use 1.0 to consider all")),
    "top_k of vLLM's older habit": (
        {"top_k": -1},
        Refusal("got -1", "`top_k` must be at least 0", "Leave it unset for the default, 0"),
    ),
    "min_p above one": (
        {"min_p": 1.5},
        Refusal("got 1.5", "`min_p` must be in [0, 1]", "Leave it unset for the default, None"),
    ),
    "repetition penalty of zero": (
        {"repetition_penalty": 0.0},
        Refusal("got 0.0", "`repetition_penalty` must be positive", "Use 1.0 for none"),
    ),
    "GPU memory in percent": (
        {"vllm_gpu_memory_utilization": 30},
        Refusal("got 30", "`vllm_gpu_memory_utilization` must be in (0, 1]", "such as 0.3 for 30 %"),
    ),
    "negative context of the server": (
        {"vllm_max_model_length": -1},
        Refusal("got -1", "`vllm_max_model_length` must be at least 2", "Leave it unset"),
    ),
    "timeout that is not a number": (
        {"vllm_server_timeout": NAN},
        Refusal("got nan", "`vllm_server_timeout` must be a finite number", "Leave it unset for the default, 240.0"),
    ),
    "sampling parameters that are no JSON": (
        {"generation_kwargs": "typical_p=0.9"},
        Refusal("'typical_p=0.9'", "`generation_kwargs` must be a dict or JSON of one", "Write it such as"),
    ),
    "sampling parameters in a list": (
        {"generation_kwargs": ["typical_p"]},
        Refusal("['typical_p'] (`list`)", "must be a dict of keyword arguments", "Write it such as {'key': 0.9}"),
    ),
    "length among the sampling parameters": (
        {"generation_kwargs": {"max_tokens": 64}},
        Refusal("`generation_kwargs` has 'max_tokens'", "self-play sets itself", "Set `max_completion_length` instead"),
    ),
    "prompt among the sampling parameters": (
        {"generation_kwargs": '{"prompt": "Hi"}'},
        Refusal("`generation_kwargs` has 'prompt'", "self-play sets itself", "Leave it out"),
    ),
    "arguments of the model as text": (
        {"model_init_kwargs": "bfloat16"},
        Refusal("'bfloat16'", "`model_init_kwargs` must be a dict", "Write it such as"),
    ),
    "negative beta": (
        {"beta": -0.1},
        Refusal("got -0.1", "`beta` must be at least 0", "Give a positive number"),
    ),
    "learning rate that is no number": (
        {"learning_rate": "5e-7e"},
        Refusal("got '5e-7e'", "`learning_rate` must be a number, or a list", "Write it such as 5.0e-7"),
    ),
    "learning rate that is not a number": (
        {"learning_rate": [1e-6, NAN, 1e-7]},
        Refusal("got nan", "`learning_rate` must be a number", "Write it such as 5.0e-7"),
    ),
    "learning rates for another number of iterations": (
        {"learning_rate": [1e-6, 1e-7]},
        Refusal("has 2 values ([1e-06, 1e-07])", "`num_iterations` is 3", "Give one number for all iterations, or one"),
    ),
    "unknown loss": (
        {"loss_type": "logistic"},
        Refusal("unknown value(s) ['logistic']", "'sigmoid'", "Use one or several of"),
    ),
    "no loss": ({"loss_type": []}, Refusal("`loss_type` is empty", "at least one loss is needed", "Leave it unset")),
    "two losses and one weight": (
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]},
        Refusal("`loss_weights` has 1 value(s) ([1.0])", "`loss_type` names 2", "Give one weight for each loss"),
    ),
    "weight that is not a number": (
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, NAN]},
        Refusal("got [1.0, nan]", "`loss_weights` must be a list of numbers of at least 0", "Leave out the losses"),
    ),
    "no batch": (
        {"per_device_train_batch_size": 0},
        Refusal("got 0", "`per_device_train_batch_size` must be at least 1", "Leave it unset for the default"),
    ),
    "no step accumulated": (
        {"gradient_accumulation_steps": 0},
        Refusal("got 0", "`gradient_accumulation_steps` must be at least 1", "Leave it unset for the default, 1"),
    ),
    "negative length": (
        {"max_length": -1},
        Refusal("got -1", "`max_length` must be at least 2", "Leave it unset for the default, 1024"),
    ),
    "negative seed": (
        {"seed": -1},
        Refusal("got -1", "`seed` must be at least 0", "Leave it unset for the default, 42"),
    ),
    "smoothing that turns the labels round": (
        {"label_smoothing": 0.7},
        Refusal("got 0.7", "`label_smoothing` must be in [0, 0.5)", "Leave it unset"),
    ),
    "server's address and no server": (
        {"vllm_server_base_url": UNUSED, "use_vllm": False},
        Refusal(f"`vllm_server_base_url='{UNUSED}'`", "contradicts", "Leave `use_vllm` unset to use the server"),
    ),
    "managed server on every interface": (
        {**MANAGED, "vllm_server_args": "--max-num-seqs 64 --host 0.0.0.0"},
        Refusal("`vllm_server_args` has '--host'", "binds to the loopback interface", "Leave it out"),
    ),
    "API key on the server's command line": (
        {**MANAGED, "vllm_server_args": "--api_key=sk-123"},
        Refusal("`vllm_server_args` has '--api_key", "It has a random one", "Leave it out"),
    ),
    "server's arguments with a quotation mark left open": (
        {**MANAGED, "vllm_server_args": "--chat-template 'a"},
        Refusal('got "--chat-template \'a"', "must be one string, written as in a shell", "close every quotation mark"),
    ),
    "column without a name": (
        {"prompt_column": "", "completion_column": "b"},
        Refusal("got ''", "`prompt_column` must be the name of a column", "leave both unset"),
    ),
    "run directory without a name": (
        {"output_dir": ""},
        Refusal("got ''", "`output_dir` must be the path of a directory", "Name the one"),
    ),
    "best model at the end": (
        {"load_best_model_at_end": True},
        Refusal("`load_best_model_at_end=True`", "evaluated between iterations", "Leave it unset"),
    ),
}


@catalogue(CONFIGURATIONS)
def test_configuration_is_refused(given, refusal, make_config):
    refused(refusal, make_config, **given)


# Data

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello."}
GOOD = {"prompt": "a", "completion": "B"}
ROW = "`skip_invalid_rows=True`"


def rows(*given: dict) -> Dataset:
    return Dataset.from_list(list(given))


DATASETS = {
    "nothing": (None, Refusal("got `NoneType`", "must be a `datasets.Dataset`", "Load one with", TypeError)),
    "all splits": (
        DatasetDict(train=rows(GOOD), test=rows(GOOD)),
        Refusal("got `DatasetDict`", "must be a `datasets.Dataset`", "one of its splits: ['test', 'train']", TypeError),
    ),
    "list of rows": ([GOOD], Refusal("got `list`", "must be a `datasets.Dataset`", "`Dataset.from_list(", TypeError)),
    "path": (
        "a.jsonl",
        Refusal("got `str`", "must be a `datasets.Dataset`", "`datasets.load_dataset('json'", TypeError),
    ),
    "stream": (
        rows(GOOD).to_iterable_dataset(),
        Refusal("`IterableDataset`", "answers all prompts anew", "without `streaming=True`", TypeError),
    ),
    "empty": (rows(GOOD).select([]), Refusal("is empty", "at least one row", "See whether the file or the split")),
    "misspelled column": (
        rows({"promt": "a", "completion": "B"}),
        Refusal("['promt', 'completion']", "`prompt` and `completion`", "Is 'promt' a misspelling of 'prompt'?"),
    ),
    "ShareGPT's column": (
        rows({"conversations": [{"from": "human", "value": "a"}]}),
        Refusal("['conversations']", "`messages`, a conversation", "rename_columns"),
    ),
    "ShareGPT's keys": (
        rows({"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}),
        Refusal("with the keys ['from', 'value']", "must be a non-empty list of messages", "{'role': ..., 'content'"),
    ),
    "images": (
        rows({**GOOD, "images": "x.png"}),
        Refusal("['images']", "prompts go to the opponent as token ids", "Use a text dataset, or remove"),
    ),
    "token ids": (
        rows({"prompt": [1, 2], "completion": [3]}),
        Refusal("Row 0: `prompt`", "must be text or a list of messages, found a list of `int`", "Give the text itself"),
    ),
    "missing prompt": (
        rows(GOOD, {"prompt": None, "completion": "B"}),
        Refusal("Row 1: `prompt`", "must be text or a list of messages, found `NoneType`", ROW),
    ),
    "empty ground truth": (
        rows(GOOD, {"prompt": "a", "completion": " "}),
        Refusal("Row 1: `completion` is empty", "Every row needs a prompt and a ground truth", "remove the row"),
    ),
    "numbers": (
        rows({"prompt": 1, "completion": 2}),
        Refusal("found `int`", "`prompt` must be text or a list of messages", "Fill the cell or remove the row"),
    ),
    "conversation as JSON text": (
        rows({"messages": json.dumps([USER, ASSISTANT])}),
        Refusal("found text", "`messages` must be a non-empty list of messages", "json.loads"),
    ),
    "conversation without an answer": (
        rows({"messages": [USER]}),
        Refusal("ends on the role 'user'", "must be the assistant's", "Remove what follows the last assistant message"),
    ),
    "assistant by another name": (
        rows({"messages": [USER, {"role": "gpt", "content": "Hello."}]}),
        Refusal("ends on the role 'gpt'", "must be the assistant's", "rename the role to 'assistant'"),
    ),
    "answer without a question": (
        rows({"messages": [ASSISTANT]}),
        Refusal("the prompt of `messages` is empty", "Every row needs a prompt and a ground truth", "remove the row"),
    ),
    "two answers in a row": (
        rows({"messages": [USER, ASSISTANT, ASSISTANT]}),
        Refusal("ends on the role 'assistant'", "an answer must follow another role", "Join two answers"),
    ),
    "prompt that ends in an answer": (
        rows({"prompt": [USER, ASSISTANT], "completion": [ASSISTANT]}),
        Refusal("`prompt` ends on the role 'assistant'", "an answer must follow another role", "Join two answers"),
    ),
    "ground truth of the user": (
        rows({"prompt": [USER], "completion": [USER]}),
        Refusal("found the roles ['user']", "must be exactly one assistant message", "Move earlier messages"),
    ),
    "content in parts": (
        rows(
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ASSISTANT | {"content": []}]}
        ),
        Refusal("`content` is a list of `dict`", "it must be text", "Join the text parts"),
    ),
    "text without a prompt": (
        rows({"chosen": "a B", "rejected": "a C"}),
        Refusal("`chosen` is text without a `prompt`", "where the prompt ends", "Separate the two"),
    ),
}


@catalogue(DATASETS)
def test_dataset_is_refused(given, refusal, play):
    tokenizer = byte_tokenizer("<|im_end|>", "qwen2_5", ["<|im_start|>"])
    refused(refusal, play, train_dataset=given, processing_class=tokenizer)


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_refusal_names_the_dataset_it_is_about(play, name):
    given = rows(GOOD, {"prompt": "a", "completion": ""})
    refused(Refusal("Row 1", "Every row needs", f"In `{name}`."), play, **{"eval_dataset": rows(GOOD), name: given})


# The rest of a run

CONVERSATIONS = rows({"messages": [USER, ASSISTANT]})
QUANTIZED = BitsAndBytesConfig(load_in_8bit=True)
PARAMETER = LlamaForCausalLM(
    LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
)
RUNS = {
    "evaluation data of another format": (
        {"eval_dataset": rows({"text": "a"})},
        Refusal("`eval_dataset` has the columns ['text']", "accepted formats", "rename_columns"),
    ),
    "evaluation data without rows": (
        {"eval_dataset": rows(GOOD).select([])},
        Refusal("`eval_dataset` is empty", "at least one row", "See whether the file or the split"),
    ),
    "named columns that are not there": (
        {
            "config": {"prompt_column": "qestion", "completion_column": "answer"},
            "train_dataset": rows({"question": "a"}),
        },
        Refusal("['question']", "`prompt_column='qestion'`", "Is 'question' a misspelling of 'qestion'?"),
    ),
    "conversations without a chat template": (
        {"train_dataset": CONVERSATIONS},
        Refusal("the tokenizer has no chat template", "The dataset is conversational", "Set `tokenizer.chat_template`"),
    ),
    "tokenizer without an end token": (
        {"processing_class": byte_tokenizer(None)},
        Refusal("no end token", "no answer could ever end", "Set `tokenizer.eos_token`"),
    ),
    "characters that the tokenizer does not know": (
        {"train_dataset": rows({"prompt": "a", "completion": "xyz"}), "processing_class": letter_tokenizer()},
        Refusal("Row 0: the tokenizer makes no tokens of `completion`", "at least one is needed", "`processing_class`"),
    ),
    "name of a tokenizer": (
        {"processing_class": "gpt2"},
        Refusal("got 'gpt2' (`str`)", "must be a tokenizer", "`AutoTokenizer.from_pretrained(...)`", TypeError),
    ),
    "folder as a path": (
        {"model": Path("models/a")},
        Refusal("(`PosixPath`)", "must be a hub id, a folder", "`str(path)`", TypeError),
    ),
    "class of a model": (
        {"model": AutoModelForCausalLM},
        Refusal("AutoModelForCausalLM", "or a loaded model", "`Class.from_pretrained(...)`", TypeError),
    ),
    "folder that is missing": (
        {"model": "/no/such/model"},
        Refusal("'/no/such/model', where there is nothing", "expected a folder with a model", "Correct the path"),
    ),
    "hub id that is wrong or out of reach": (
        {"model": "Qwn/Qwen2.5"},
        Refusal(
            "'Qwn/Qwen2.5' cannot be read", "expected is what `save_pretrained` writes", "see its spelling, access"
        ),
    ),
    "configuration of another trainer": (
        {"args": DPOConfig(output_dir="x", use_cpu=True, bf16=False)},
        Refusal("got `DPOConfig`", "must be a `SPINConfig`", "Write `SPINConfig(...)`", TypeError),
    ),
    "reference model": (
        {"ref_model": PARAMETER},
        Refusal("`ref_model` is not used", "the reference is the opponent", "Leave it out"),
    ),
    "evaluation within an iteration": (
        {"config": {"eval_strategy": "steps"}},
        Refusal("`eval_strategy='steps'`", "not supported", "Leave `eval_strategy` unset"),
    ),
    "prompts that are all longer than the limit": (
        {"config": {"max_length": 3}},
        Refusal("the shortest has 4 tokens", "leaves room for at most 2", "Raise that limit or shorten the prompts"),
    ),
    "sampling parameter that transformers does not know": (
        {"config": {"generation_kwargs": {"typicl_p": 0.9}}},
        Refusal("['typicl_p']", "the fields of transformers' `GenerationConfig`", "Correct or remove them"),
    ),
    "adapter as a dict": (
        {"peft_config": {"r": 8}},
        Refusal("got {'r': 8} (`dict`)", "must be a `PeftConfig`", "Write `LoraConfig(", TypeError),
    ),
    "adapter that is frozen": (
        {"peft_config": LoraConfig(inference_mode=True)},
        Refusal("`inference_mode=True`", "is what is to be trained", "Set `inference_mode=False`"),
    ),
    "adapter that a server cannot play": (
        {"config": SERVER, "peft_config": LoraConfig(alora_invocation_tokens=[1])},
        Refusal("`alora_invocation_tokens=[1]`", "Use a plain `LoraConfig`", "set `use_vllm=False`"),
    ),
    "prompt tuning with a server": (
        {"config": SERVER, "peft_config": PromptTuningConfig(num_virtual_tokens=4)},
        Refusal("`peft_type=PROMPT_TUNING`", "Use a plain `LoraConfig`", "set `use_vllm=False`"),
    ),
    "layers that the adapter repeats": (
        {"config": SERVER, "peft_config": LoraConfig(layer_replication=[[0, 2]])},
        Refusal("`layer_replication=[[0, 2]]`", "Use a plain `LoraConfig`", "set `use_vllm=False`"),
    ),
    "adapter of too high a rank": (
        {"config": MANAGED, "peft_config": LoraConfig(r=600)},
        Refusal("got rank 600", "up to rank 512", "Use a smaller `r`"),
    ),
    "initial model that cannot be had back": (
        {"config": {"opponent_reference": "fixed"}, "peft_config": LoraConfig(init_lora_weights="pissa")},
        Refusal("`init_lora_weights='pissa'`", "the adapter switched off", "Use `init_lora_weights=True`"),
    ),
    "metrics that are no function": (
        {"eval_dataset": rows(GOOD), "compute_generation_metrics": "accuracy"},
        Refusal("got 'accuracy' (`str`)", "must be a function", "takes prompts, references and generations", TypeError),
    ),
    "metrics without evaluation data": (
        {"compute_generation_metrics": len},
        Refusal("`compute_generation_metrics` is given", "answers to `eval_dataset`, and that is None", "Pass an"),
    ),
    "optimizer alone": (
        {"optimizers": SGD(PARAMETER.parameters(), lr=1)},
        Refusal("SGD", "must be a pair of an optimizer and a scheduler", "Pass `(optimizer, None)`", TypeError),
    ),
    "learning rates beside a scheduler": (
        {
            "config": {"learning_rate": [1e-6, 1e-7, 1e-8]},
            "optimizers": (None, ConstantLR(SGD(PARAMETER.parameters(), lr=1))),
        },
        Refusal("`learning_rate` has a value for each", "sets the learning rate", "Pass `(optimizer, None)`"),
    ),
    "optimizer that cannot begin anew": (
        {"optimizers": (Adagrad(PARAMETER.parameters()), None)},
        Refusal("`torch.optim.Adagrad`", "its moments cannot be emptied", "Set `reset_optimizer=False`"),
    ),
    "sleep for a server that others use": (
        {"config": {**SERVER, "vllm_sleep": True}},
        Refusal("`vllm_server_base_url` names one that runs already", "the run has started itself", "Set `vllm_mode="),
    ),
    "sleep without a server": (
        {"config": {"vllm_sleep": True}},
        Refusal("no server generates", "the run has started itself", "Set `vllm_mode='managed'`"),
    ),
    "policy that makes way for itself": (
        {"config": {"offload_policy_during_generation": True}},
        Refusal("in-process generation", "the policy itself answers", "Use a vLLM server, or leave it unset"),
    ),
    "quantized policy that makes way": (
        {"config": {**MANAGED, "offload_policy_during_generation": True}, "quantization_config": QUANTIZED},
        Refusal("quantized otherwise", "quantized to 4 bits by bitsandbytes", "lower `vllm_gpu_memory_utilization`"),
    ),
    "policy that is quantized when it is loaded and makes way": (
        {
            "config": {
                **MANAGED,
                "offload_policy_during_generation": True,
                "model_init_kwargs": {"quantization_config": QUANTIZED},
            }
        },
        Refusal("quantized otherwise", "quantized to 4 bits by bitsandbytes", "lower `vllm_gpu_memory_utilization`"),
    ),
}


@pytest.mark.parametrize(
    ("engine", "remedy"),
    [("DeepSpeed ZeRO-1", "DeepSpeed's own `offload_optimizer`"), ("FSDP", "FSDP's own `offload_params`")],
)
def test_sharded_policy_that_makes_way_is_refused(play, make_config, monkeypatch, engine, remedy):
    args = make_config(**MANAGED, offload_policy_during_generation=True)
    if engine != "FSDP":
        args.deepspeed_plugin = SimpleNamespace(zero_stage=1, deepspeed_config={})
    else:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    refused(Refusal(f"{engine} holds", "moves whole tensors", remedy), play, args=args)


@catalogue(RUNS)
def test_run_is_refused(given, refusal, play):
    refused(refusal, play, **given)


def test_model_of_which_nothing_would_be_trained_is_refused(play, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model).requires_grad_(False)
    refused(Refusal("parameters of `model` are frozen", "training needs some", "`peft_config`"), play, model=model)


@pytest.mark.parametrize(
    ("name", "content", "refusal"),
    [
        ("config.json", None, Refusal("has no config.json", "`model.save_pretrained(folder)`", "Correct the path")),
        ("config.json", "{oops", Refusal("configuration", "what `save_pretrained` writes", "Correct `model`")),
        ("config.json", "{}", Refusal("`model_type`", "what `save_pretrained` writes", "Correct `model`")),
        ("tokenizer.json", None, Refusal("The tokenizer", "what `save_pretrained` writes", "pass `processing_class`")),
    ],
    ids=["none", "broken", "empty", "no tokenizer"],
)
def test_folder_of_a_model_is_refused_for_what_it_lacks(weightless, play, tmp_path, name, content, refusal):
    for file in Path(weightless).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_text(content)
    refused(refusal, play, model=str(tmp_path))


def test_folder_of_an_adapter_is_refused_as_a_model(play, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(Refusal("of an adapter", "expected is a model", "`PeftModel.from_pretrained("), play, model=str(tmp_path))


# Server


def vllm(**options):
    """A vLLM server as far as it is asked, that serves the model under its folder's name."""
    return FakeVLLM("weightless", **options)


def locked(path: str, body: dict | None):
    return (200, "") if path == "/health" else (401, {"error": "Unauthorized"})


SERVERS = {
    "wrong API key": (
        locked,
        Refusal("HTTP 401", "It expects another API key", "set `vllm_api_key` or VLLM_API_KEY", SamplerError),
    ),
    "server of another model": (
        FakeVLLM("org/other"),
        Refusal("serves ['org/other']", "not '/", "spin_trl.serve", SamplerError),
    ),
    "web page": (
        lambda path, body: (200, "<html>It works!</html>"),
        Refusal("<html>It works!</html>", "is no vLLM server", "Correct `vllm_server_base_url`", SamplerError),
    ),
    "other server that speaks JSON": (
        lambda path, body: (200, {"models": []}),
        Refusal("{'models': []}", "a list of models with their `id`", "Correct `vllm_server_base_url`", SamplerError),
    ),
    "other server that speaks OpenAI's API": (
        lambda path, body: (200, {"data": [{"id": "weightless", "object": "model"}]}),
        Refusal("serves 'weightless' without saying", "a vLLM server does in `max_model_len`", "Start", SamplerError),
    ),
    "server without that path": (
        lambda path, body: (404, "Not Found"),
        Refusal("HTTP 404: Not Found", "Expected is a vLLM server", "correct `vllm_server_base_url`", SamplerError),
    ),
    "server without LoRA": (
        vllm(adapters=False),
        Refusal("without `--enable-lora`", "load the LoRA adapters", "spin_trl.serve", SamplerError),
    ),
    "context that holds no prompt": (
        vllm(context_length=4),
        Refusal("has a context of 4 tokens", "at least 5 are needed", "larger `--max-model-len`", SamplerError),
    ),
}


@catalogue(SERVERS)
def test_server_is_refused(given, refusal, play):
    server = FaultyServer()
    server.answer = given
    try:
        refused(
            refusal, play, {"vllm_server_base_url": server.url}, peft_config=LoraConfig(target_modules="all-linear")
        )
    finally:
        server.close()


@pytest.mark.parametrize(
    ("url", "refusal"),
    [
        ("localhost:8000", Refusal("'localhost:8000'", "must begin with 'http://'", "Set `vllm_server_base_url`")),
        ("", Refusal("''", "must begin with 'http://'", "Set `vllm_server_base_url`")),
        (
            UNUSED,
            Refusal("Cannot connect to host 127.0.0.1:9", "within `vllm_server_timeout`", "Start it with `python"),
        ),
    ],
    ids=["no scheme", "empty", "nobody there"],
)
def test_address_is_refused(url, refusal, play):
    config = {"vllm_server_base_url": url, "vllm_server_timeout": 0.1}
    refused(refusal._replace(error=SamplerError), play, config)


# Run directory


@pytest.mark.parametrize("below", ["", "run"], ids=["a file", "below a file"])
def test_run_directory_that_cannot_be_one_is_refused(play, tmp_path, below):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / below
    refusal = Refusal(f"`output_dir` is '{path}'", "is no directory", "Choose a path", NotADirectoryError)
    refused(refusal, play, {"output_dir": str(path)})
    assert (tmp_path / "file").read_text() == ""


# The script

SCRIPTS = {
    "misspelled key": (
        "num_iteration: 2",
        Refusal("'--num_iteration'", "Unknown arguments from config file", "remove"),
    ),
    "no data": (
        "train_file: null",
        Refusal("`train_file=None` and `dataset_name=None`", "either `train_file`", "Set either"),
    ),
    "data twice": (
        "dataset_name: some/data",
        Refusal("`dataset_name='some/data'`", "either `train_file` (a local file) or `dataset_name`", "Set either"),
    ),
    "file of an unknown ending": (
        "train_file: data.txt",
        Refusal("'data.txt', which ends in '.txt'", "['.csv', '.json', '.jsonl', '.parquet']", "convert the file"),
    ),
    "file that is missing": (
        "train_file: no.jsonl",
        Refusal("'no.jsonl', which is no file", "Expected an existing file", "Correct the path"),
    ),
    "file that is empty": (
        "train_file: empty.jsonl",
        Refusal("'empty.jsonl' is empty", "expected is one JSON object a line", "See what should have written it"),
    ),
    "line that is no JSON": (
        "train_file: broken.jsonl",
        Refusal("line 3 is no JSON", "Expected is one JSON object a line", "Correct or remove what is broken"),
    ),
    "file of another format than its ending says": (
        "train_file: broken.parquet",
        Refusal("Parquet magic bytes not found", "Expected is a Parquet file", "Correct or remove what is broken"),
    ),
    "split of the hub with local data": (
        "evaluate: true",
        Refusal("`evaluate=True`", "takes a split of `dataset_name`", "Set `eval_file` instead"),
    ),
    "split that is not there": (
        "train_file: null\ndataset_name: folder\ndataset_train_split: trian",
        Refusal("`dataset_train_split` is 'trian'", "the splits ['train']", "Set it to one"),
    ),
    "metrics without a function": (
        "generation_metrics: metrics.py",
        Refusal("got 'metrics.py'", "must be 'file.py:function'", "Correct the path"),
    ),
    "metrics in no file": (
        "generation_metrics: no.py:f",
        Refusal("got 'no.py:f'", "must be 'file.py:function' with an existing file", "Correct the path"),
    ),
    "metrics that the file does not define": (
        "generation_metrics: metrics.py:acuracy",
        Refusal("names 'acuracy'", "does not define as a function", "Name one of ['accuracy']"),
    ),
    "no model": ("", Refusal("got None", "must be a hub id, a folder", "Pass a path as", TypeError)),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A directory with a good file, and bad ones."""
    good = "".join(json.dumps(row) + "\n" for row in read_rows("accent_train.jsonl", 2))
    (tmp_path / "good.jsonl").write_text(good)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text(good + '{"prompt": "a", "completion": "B"\n' + good)
    (tmp_path / "broken.parquet").write_text("prompt,completion\n" + good)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text(good)
    (tmp_path / "metrics.py").write_text("def accuracy(prompts, references, generations): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


@catalogue(SCRIPTS)
def test_script_refuses(given, refusal, folder, weightless):
    model = {} if refusal.found == "got None" else {"model_name_or_path": weightless}
    settings = {"output_dir": "run", "use_cpu": True, "bf16": False, "use_vllm": False, "train_file": "good.jsonl"}
    lines = [f"{key}: {json.dumps(value)}" for key, value in {**settings, **model}.items() if f"{key}:" not in given]
    (folder / "config.yaml").write_text("\n".join([*lines, given]))
    spin = load_recipe("spin")

    def run():
        parser = TrlParser((spin.SPINScriptArguments, SPINConfig, ModelConfig))
        spin.main(*parser.parse_args_and_config(["--config", "config.yaml"]))

    refused(refusal, run)
