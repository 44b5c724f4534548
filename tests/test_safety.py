"""What a run keeps to itself: its key, the code it executes, and the files it touches."""

import json
import os
import pickle
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
import torch
from play_short import play_in_process
from test_reference_mixture import changed_model
from transformers import TrainerCallback

from spin_trl.generation.sampler import SamplerError
from spin_trl.run_directory.store import IterationStore, RunDirectoryError
from spin_trl.serve import _exposure_warning


KEY = "sk-this-key-must-not-be-found"


# The API key


def test_api_key_is_in_no_file_of_a_run_and_in_none_of_its_output(tiny_model, tmp_path):
    """With checkpoints and a model card, and told to say all it can."""
    config = {"output_dir": str(tmp_path / "run"), "log_level": "debug", "save_strategy": "steps", "save_steps": 1}
    environment = {"TRANSFORMERS_VERBOSITY": "debug", "VLLM_API_KEY": KEY}
    output = play_in_process(tmp_path, environment, model=tiny_model, config=config)
    assert "SPINConfig(" in output and "Plan" in output
    assert KEY not in output
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"self_play.json", "training_args.bin", "README.md", "optimizer.pt", "metrics.json"} <= names
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
    for path in files:
        if path.name == "training_args.bin":  # a zip file: what is in it might be compressed
            assert KEY not in str(vars(torch.load(path, weights_only=False)))


def test_server_and_all_its_processes_listen_on_loopback_alone_and_show_no_key(lora_server):
    process = psutil.Process(lora_server.process.pid)
    processes = [process, *process.children(recursive=True)]
    connections = [connection for process in processes for connection in process.net_connections()]
    addresses = {connection.laddr for connection in connections if connection.status == psutil.CONN_LISTEN}
    assert int(lora_server.base_url.rpartition(":")[2]) in {address.port for address in addresses}
    assert {address.ip for address in addresses} == {"127.0.0.1"}
    commands = [" ".join(process.cmdline()) for process in processes]
    assert len(commands) > 2 and not any(lora_server.api_key in command for command in commands)
    assert lora_server.api_key not in lora_server.log_path.read_text()


def test_warning_of_an_open_server_names_what_its_api_key_does_not_guard(lora_server, tiny_model):
    """Asked of a real server without its key: whatever it does then has to be named."""
    adapter = {"name": "a", "src": "/nonexistent/adapter", "lora_name": "a", "lora_path": "/nonexistent/adapter"}
    prompt = {"model": tiny_model, "prompt": "a", "max_tokens": 1}
    bodies = {"/v1/load_lora_adapter": adapter, "/adapters": adapter, "/v1/completions": prompt, "/invocations": prompt}
    answers = {path: lora_server.ask(path, body, with_key=False) for path, body in bodies.items()}
    assert answers["/v1/load_lora_adapter"][0] == answers["/v1/completions"][0] == 401
    assert "/nonexistent/adapter" in answers["/adapters"][1]  # it has looked for it
    assert answers["/invocations"][0] == 200
    warning = _exposure_warning("0.0.0.0", lora_rank=8)
    assert "/adapters" in warning and "/invocations" in warning


# Pickles


class Evil:
    """Makes a directory when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def plant(directory: Path, trace: Path) -> None:
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.bin"):
        torch.save(Evil(trace), directory / name)
    (directory / "state.pkl").write_bytes(pickle.dumps(Evil(trace)))


def test_planted_pickles_do_run_code_if_they_are_loaded(tmp_path):
    plant(tmp_path, tmp_path / "trace")
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "trace").exists()


class PlantInOpponent(TrainerCallback):
    """Puts pickles beside the first opponent, or in place of its weights, before anything loads it."""

    def __init__(self, trace: Path, in_place: bool):
        self.trace = trace
        self.in_place = in_place

    def on_step_begin(self, args, state, control, **kwargs):
        opponent = Path(args.output_dir, "iteration-0", "opponent")
        plant(opponent, self.trace)
        if self.in_place:
            (opponent / "model.safetensors").unlink(missing_ok=True)


@pytest.mark.parametrize("in_place", [False, True])
def test_pickles_beside_an_opponent_or_in_its_place_are_not_run(
    build_trainer, tiny_model, tokenizer, tmp_path, in_place
):
    """The model is not what lies in its folder, so the first opponent is saved, and loaded again as the reference."""
    arguments = {"model": changed_model(tiny_model), "processing_class": tokenizer}
    arguments["callbacks"] = [PlantInOpponent(tmp_path / "trace", in_place)]
    trainer = build_trainer(num_iterations=2, reference_mixture_alpha=1.0, **arguments)
    refused = pytest.raises(OSError, match=r"no file named model\.safetensors found")
    with refused if in_place else nullcontext():
        trainer.train()
    assert (trainer.store.path(0, "opponent") / "pytorch_model.bin").exists()
    assert not (tmp_path / "trace").exists()


def test_pickles_in_a_run_directory_are_not_run_when_it_is_resumed(play_run, tmp_path):
    settings = {"save_strategy": "epoch", "resume": "auto"}
    first = play_run(num_iterations=1, **settings)
    (checkpoint,) = first.store.checkpoints()
    plant(checkpoint, tmp_path / "trace")
    plant(first.store.path(0), tmp_path / "trace")
    assert play_run(num_iterations=2, **settings).run.start.checkpoint == checkpoint
    assert not (tmp_path / "trace").exists()


# Code that comes with a model

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({trace!r}).touch()
class CustomConfig(LlamaConfig):
    model_type = "custom-llama"
class CustomModel(LlamaForCausalLM):
    config_class = CustomConfig
class CustomTokenizer(PreTrainedTokenizerFast):
    pass
def generate(model, *args, **kwargs):
    return model.generate(*args, **kwargs)
"""


def with_code(tiny_model: str, folder: Path, part: str, trace: Path) -> str:
    """A copy of the model whose configuration, tokenizer or generation is code of its own, which leaves a trace."""
    shutil.copytree(tiny_model, folder)
    code = CODE.format(trace=str(trace))
    (folder / "custom.py").write_text(code)
    if part == "generation":
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(code)
        return str(folder)
    if part == "tokenizer":
        name, changes = "tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "custom.CustomTokenizer"]}}
        changes["tokenizer_class"] = "CustomTokenizer"
    else:
        auto_map = {"AutoConfig": "custom.CustomConfig", "AutoModelForCausalLM": "custom.CustomModel"}
        name, changes = "config.json", {"auto_map": auto_map, "model_type": "custom-llama"}
        changes["architectures"] = ["CustomModel"]
    (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **changes}))
    return str(folder)


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """Code that is trusted is copied there, and not into the user's own cache."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_code_of_a_model_is_run_only_if_it_is_trusted(
    build_trainer, tiny_model, tmp_path, part, trusted, modules_cache
):
    folder = with_code(tiny_model, tmp_path / "custom", part, tmp_path / "trace")
    refused = pytest.raises(ValueError, match=r"is code of its own(.|\n)*set `trust_remote_code=True`")
    with nullcontext() if trusted else refused:
        build_trainer(model=folder, trust_remote_code=trusted)
    assert (tmp_path / "trace").exists() is trusted


def test_code_for_generation_that_lies_with_a_model_is_not_run(play_run, tiny_model, tmp_path):
    folder = with_code(tiny_model, tmp_path / "custom", "generation", tmp_path / "trace")
    play_run(model=folder, num_iterations=1, max_steps=1)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_managed_server_trusts_a_models_code_only_if_the_run_does(build_trainer, trusted):
    trainer = build_trainer(use_vllm=True, trust_remote_code=trusted, vllm_server_timeout=0.1)
    with pytest.raises(SamplerError, match="was not up"):
        trainer.train()
    assert ("--trust-remote-code" in trainer.store.server_log.read_text().splitlines()[0]) is trusted


# Names that come from outside


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """Somebody else's directory."""
    (tmp_path / "elsewhere" / "generations").mkdir(parents=True)
    (tmp_path / "elsewhere" / "metrics.json").write_text('{"mine": 1}')
    (tmp_path / "elsewhere" / "generations" / "part-00000000-1-0123456789abcdef.parquet").write_text("?")
    return tmp_path / "elsewhere"


@pytest.fixture
def store(tmp_path) -> IterationStore:
    (tmp_path / "run").mkdir()
    return IterationStore(tmp_path / "run")


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_clearing_a_run_deletes_links_and_not_what_they_lead_to(store, elsewhere):
    before = content(elsewhere)
    for name in ("iteration-0", "checkpoint-5", "self_play.json"):
        (store.output_dir / name).symlink_to(elsewhere)
    (store.output_dir / "iteration-1").symlink_to(store.output_dir / "gone")
    store.clear()
    assert list(store.output_dir.iterdir()) == []
    assert content(elsewhere) == before and len(before) == 2


# What is a link, and what must not go through it.
LINKS = {
    "metrics": ("iteration-0", lambda store: store.write_metrics(0, {"a": 1})),
    "reading metrics": ("iteration-0", lambda store: store.read_metrics(0)),
    "completions": ("iteration-0", lambda store: store.completions(0, "generations").completed_rows()),
    "opponent": ("iteration-0", lambda store: store.write_opponent(0, lambda path: Path(path).mkdir(), True)),
    "pairs": ("iteration-0", lambda store: store.write_pairs(0, None, {})),
    "parts": ("iteration-0/generations", lambda store: store.completions(0, "generations").completed_rows()),
    "rows of pairs": ("iteration-0/pairs/rows.arrow", lambda store: store.pairs(0).is_whole()),
    "rows of data": ("train_data/rows.arrow", lambda store: store.read_data()),
    "server's log": ("vllm-server.log", lambda store: store.server_log),
}


@pytest.mark.parametrize(("link", "use"), LINKS.values(), ids=LINKS)
def test_nothing_is_read_written_or_deleted_through_a_link(store, elsewhere, link, use):
    before = content(elsewhere)
    (store.output_dir / link).parent.mkdir(parents=True, exist_ok=True)
    target = elsewhere / "generations" if link.endswith("generations") else elsewhere
    (store.output_dir / link).symlink_to(target)
    store.clear_temporary()
    with pytest.raises(RunDirectoryError, match=r" is a link to .*elsewhere.*Remove the link"):
        use(store)
    assert content(elsewhere) == before


def test_linked_checkpoint_is_none(store, elsewhere):
    (store.output_dir / "checkpoint-5").symlink_to(elsewhere)
    for checkpoint in (elsewhere, store.output_dir / "checkpoint-4"):
        checkpoint.mkdir(exist_ok=True)
        (checkpoint / "self_play.json").touch()
    assert [path.name for path in store.checkpoints()] == ["checkpoint-4"]


def test_iteration_that_is_no_number_is_no_path(store):
    with pytest.raises(ValueError):
        store.path("../../elsewhere")
