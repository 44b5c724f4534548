"""What the tests share: a tiny model, small data, and real vLLM servers that play it."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub: no test waits for a hub
os.environ.setdefault("VLLM_API_KEY", "sk-of-the-tests")  # real servers expect it, and runs send it
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads crawl on a busy machine

import importlib.util
import json
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from datasets import Dataset, disable_progress_bars
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, TrainerCallback

from spin_trl.run_directory.completion_parts import COMPLETION_SCHEMA
from spin_trl.run_directory.store import IterationStore


ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
DATA = RECIPES / "data" / "pronunciation"

# What DeepSpeed compiles goes beside the packages. A compilation that was killed leaves a lock that is waited for
# forever, so none of an earlier session may stay, nor may one in the user's own cache matter.
os.environ["TORCH_EXTENSIONS_DIR"] = str(Path(sys.prefix, "torch_extensions"))
for stale_lock in Path(sys.prefix, "torch_extensions").rglob("lock"):
    stale_lock.unlink()

sys.path.insert(0, str(RECIPES))  # recipes import each other by name, as they do when run
disable_progress_bars()
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run side by side, one process starts the servers that many share, and a file stays in one piece."""
    for item in items:
        is_served = {"lora_server", "full_server"} & set(item.fixturenames)
        item.add_marker(pytest.mark.xdist_group("servers" if is_served else item.path.stem))


def load_recipe(name: str):
    """A script of `recipes/` as a module."""
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_rows(name: str, num_rows: int) -> list[dict]:
    lines = (DATA / name).read_text().splitlines()[:num_rows]
    return [json.loads(line) for line in lines]


def all_completions(store: IterationStore, iteration: int, kind: str = "generations") -> pa.Table:
    """What the parts of an iteration hold, by row and sample."""
    return pa.concat_tables(store.completions(iteration, kind).batches())


def logp(model, prompt_ids: list[int], completion_ids: list[int]) -> float:
    """Of the completion, computed without padding and without any trainer."""
    ids = torch.tensor([prompt_ids + completion_ids])
    with torch.no_grad():
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    return logps[len(prompt_ids) - 1 :].sum().item()


def trained(trainer, checkpoint: str | bool | None = None):
    """The trainer when it has trained, from a checkpoint if one is given."""
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


class BeforeFirstSteps(TrainerCallback):
    """Notes what `look(model, pairs)` finds before each iteration's first step, when the policy is the opponent."""

    def __init__(self, trainer, look):
        self.trainer, self.look, self.found = trainer, look, []
        trainer.add_callback(self)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.trainer.run.place.first_step:
            model.eval()
            self.found.append(self.look(model, self.trainer.train_dataset))
            model.train()


def completion_table(keys: list[tuple[int, int]], ids: list[list[int]], reasons: list[str] | None = None) -> pa.Table:
    """Completions by row and sample, as they come from disk."""
    rows, samples = ([key[i] for key in keys] for i in (0, 1))
    columns = {"row": rows, "sample": samples, "completion_ids": ids, "finish_reason": reasons or ["stop"] * len(ids)}
    return pa.table(columns, schema=COMPLETION_SCHEMA)


@pytest.fixture(scope="session")
def tokenizer():
    """The demo's tokenizer: one token a letter, one a phone."""
    phones = sorted({phone for row in read_rows("train.jsonl", 10_000) for phone in row["completion"].split()})
    return load_recipe("pronunciation_sft").build_tokenizer(phones)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tokenizer) -> str:
    """Folder of a Llama of 0.1 million parameters, barely trained, so that it answers differently to each prompt."""
    model = small_llama(tokenizer, num_positions=64)
    train_briefly(model, tokenizer)
    return saved(model, tokenizer, tmp_path_factory.mktemp("models") / "tiny")


def small_llama(tokenizer, num_positions: int) -> LlamaForCausalLM:
    """The same each time, and untrained."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=num_positions,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def saved(model, tokenizer, folder: Path) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def train_briefly(model, tokenizer, num_steps: int = 60) -> None:
    """Enough for the end token to come about where it should."""
    rows = read_rows("train.jsonl", 64 * num_steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(num_steps):
        texts = [row["prompt"] + row["completion"] + "</s>" for row in rows[64 * step : 64 * (step + 1)]]
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def train_dataset() -> Dataset:
    return Dataset.from_list(read_rows("accent_train.jsonl", 48))


@pytest.fixture
def eval_dataset() -> Dataset:
    return Dataset.from_list(read_rows("accent_test.jsonl", 16))


# Settings of a run of the tiny model on the CPU.
TINY_RUN = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "report": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "max_completion_length": 12,
    "use_vllm": False,
    "identical_pairs": "keep",  # one pair for every prompt, whatever the tiny model happens to answer
}


@pytest.fixture
def make_config(tmp_path):
    """A factory of configurations for the tiny model on the CPU; keyword arguments override."""
    from spin_trl import SPINConfig

    def make(**overrides) -> SPINConfig:
        settings = {"output_dir": str(tmp_path / "run"), **TINY_RUN}
        if "vllm_server_base_url" in overrides:
            del settings["use_vllm"]
        return SPINConfig(**{**settings, **overrides})

    return make


@pytest.fixture
def build_trainer(tiny_model, train_dataset, make_config):
    """A factory of trainers of the tiny model. What is no argument of the trainer is a setting."""
    from spin_trl import SPINTrainer

    names = "model processing_class peft_config quantization_config data_collator callbacks sampler eval_dataset"
    names += " compute_generation_metrics reward_funcs preference_dataset optimizers"

    def build(num_rows: int = 48, /, **given) -> SPINTrainer:
        arguments = {name: given.pop(name) for name in names.split() if name in given}
        data = given.pop("train_dataset", None) or train_dataset.select(range(num_rows))
        return SPINTrainer(**{"model": tiny_model, **arguments}, args=make_config(**given), train_dataset=data)

    return build


@pytest.fixture
def play_run(build_trainer):
    """A factory of trainers, as `build_trainer`, that have trained."""
    return lambda *args, **given: trained(build_trainer(*args, **given))


@pytest.fixture
def at_forward(monkeypatch):
    """Has `act()` called before the first forward pass of a Llama at which `when()` is true."""

    def register(act, when=lambda: True) -> None:
        forward, done = LlamaModel.forward, []

        def first(*args, **kwargs):
            if not done and when():
                done.append(True)
                act()
            return forward(*args, **kwargs)

        monkeypatch.setattr(LlamaModel, "forward", first)

    return register


@pytest.fixture(scope="session")
def loss(tiny_model, tmp_path_factory):
    """The trainer's loss, as a function of log-probs; see `LossProbe`."""
    from loss_probe import LossProbe

    from spin_trl import SPINConfig, SPINTrainer

    config = SPINConfig(
        output_dir=str(tmp_path_factory.mktemp("losses")), use_cpu=True, bf16=False, report_to="none", use_vllm=False
    )
    dataset = Dataset.from_dict({"prompt": ["a"], "completion": ["A"]})
    return LossProbe(SPINTrainer(tiny_model, config, train_dataset=dataset))


@pytest.fixture(scope="session")
def lora_server(tmp_path_factory, tiny_model):
    """A `RealServer` for adapters up to rank 8."""
    yield from _serve(tiny_model, tmp_path_factory, "--lora-rank", "8")


@pytest.fixture(scope="session")
def full_server(tmp_path_factory, tiny_model):
    """A `RealServer` for full weights."""
    yield from _serve(tiny_model, tmp_path_factory)


def _serve(model: str, tmp_path_factory, *arguments: str):
    from real_server import RealServer

    server = RealServer(model, tmp_path_factory.mktemp("server") / "log", "--max-model-len", "48", *arguments)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def faulty():
    """A `FaultyServer`."""
    from fault_server import FaultyServer

    server = FaultyServer()
    yield server
    server.close()


@pytest.fixture
def connect():
    """A factory of samplers, each connected to servers at the given addresses; they are closed at the end."""
    from fault_server import PATIENCE

    from spin_trl.generation.vllm.http_api import VLLMServer
    from spin_trl.generation.vllm.sampler import VLLMSampler

    samplers = []

    def make(*urls: str, model="org/base-model", lora_rank=8, run_name="run", min_context_length=20, **options):
        names = ("served_model", "vocab_size", "max_concurrent_requests")
        own = {name: options.pop(name) for name in names if name in options}
        options = {"server_timeout": PATIENCE, "delay": 0.01, **options}
        samplers.append(VLLMSampler(model, lora_rank, **own))
        samplers[-1].connect([VLLMServer(url, **options) for url in urls], run_name, min_context_length)
        return samplers[-1]

    yield make
    for sampler in samplers:
        sampler.close()


@pytest.fixture
def play(faulty, connect):
    """A factory of samplers that are connected to `faulty`, with the given answers."""
    from fault_server import FakeVLLM

    def make(answer=None, lora_rank: int | None = 8, **options):
        faulty.answer = answer or FakeVLLM()
        return connect(faulty.url, lora_rank=lora_rank, **options)

    return make


@pytest.fixture
def make_server(tmp_path):
    """A factory of managed servers that run a small program, see `fake_server`; they are stopped at the end."""
    from managed import fake_server

    servers = []

    def make(**options):
        servers.append(fake_server(tmp_path, **options))
        servers[-1].start()
        return servers[-1]

    yield make
    for server in servers:
        server.stop()
