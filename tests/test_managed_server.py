"""A run that starts a vLLM server for itself (`vllm_mode: managed`), real, on the CPU."""

import os
import signal
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from peft import LoraConfig

from spin_trl import SPINTrainer
from spin_trl.generation.sampler import SamplerError
from spin_trl.generation.vllm.managed_server import ManagedServer


class Servers:
    """The server processes that a test has started, by a variable in their environment that is this test's alone."""

    VARIABLE = "SPIN_TRL_TEST"

    def __init__(self):
        self.name = uuid.uuid4().hex

    def running(self) -> list[str]:
        """Command lines of those that run."""
        mark = f"{self.VARIABLE}={self.name}".encode()
        return [
            command
            for command, environment in running_processes()
            if mark in environment and ("spin_trl.generation.vllm.supervise" in command or "vllm" in command)
        ]

    def wait_until_gone(self, seconds: float) -> list[str]:
        deadline = time.monotonic() + seconds
        while (left := self.running()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left


@pytest.fixture
def servers(monkeypatch) -> Servers:
    found = Servers()
    monkeypatch.setenv(found.VARIABLE, found.name)
    return found


def running_processes() -> Iterator[tuple[str, list[bytes]]]:
    """Command line and environment of every other process."""
    for folder in set(Path("/proc").glob("[0-9]*")) - {Path(f"/proc/{os.getpid()}")}:
        try:
            command, environment = [(folder / name).read_bytes().split(b"\0") for name in ("cmdline", "environ")]
        except OSError:  # it has ended meanwhile, or is somebody else's
            continue
        yield b" ".join(command).decode(), environment


def test_run_starts_its_own_server_and_stops_it_at_the_end(servers, tiny_model, train_dataset, make_config):
    config = make_config(num_iterations=2, vllm_mode="managed")
    trainer = SPINTrainer(
        tiny_model, config, train_dataset=train_dataset, peft_config=LoraConfig(r=8, target_modules="all-linear")
    )
    trainer.train()
    assert trainer.store.read_run()["sampler"]["mode"] == "managed"
    assert trainer.store.read_metrics(1)["publish_check_difference"] < 1e-4
    assert servers.running() == []
    log = trainer.store.server_log.read_text()
    assert "--enable-lora" in log.splitlines()[0] and "--host 127.0.0.1" in log.splitlines()[0]


def test_server_is_gone_when_the_run_fails(servers, tiny_model, train_dataset, eval_dataset, make_config):
    def fail(prompts, references, generations):
        assert servers.running()  # it is up by now
        raise ZeroDivisionError("in the user's metrics")

    trainer = SPINTrainer(
        tiny_model,
        make_config(vllm_mode="managed"),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        compute_generation_metrics=fail,
    )
    with pytest.raises(ZeroDivisionError, match="in the user's metrics"):
        trainer.train()
    assert servers.running() == []


def test_server_is_gone_when_the_trainer_is_killed(servers, tiny_model, tmp_path):
    script = f"""
    import time
    from pathlib import Path
    from spin_trl.generation.vllm.managed_server import ManagedServer

    server = ManagedServer(Path({str(tmp_path / "log")!r}), 240, model={tiny_model!r}, dtype="float32")
    server.start(show_progress=False)
    print("up", flush=True)
    time.sleep(600)
    """
    trainer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout.readline() == "up\n"
    assert servers.running()
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    assert servers.wait_until_gone(seconds=60) == []


def test_api_key_guards_the_server_and_stands_in_no_file_or_command_line(full_server):
    request = urllib.request.Request(f"{full_server.base_url}/v1/models")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(request)
    assert full_server.api_key not in full_server.log_path.read_text()
    assert not [command for command, _ in running_processes() if full_server.api_key in command]


def test_server_that_cannot_start_shows_the_end_of_its_log(servers, tmp_path):
    server = ManagedServer(tmp_path / "log", timeout=120, model=str(tmp_path / "no-such-model"))
    with pytest.raises(SamplerError, match=r"ended with status \d+ while starting(.|\n)*no-such-model"):
        server.start(show_progress=False)
    assert servers.running() == []


def test_server_that_takes_too_long_is_stopped(servers, tiny_model, tmp_path):
    server = ManagedServer(tmp_path / "log", timeout=1, model=tiny_model, max_model_length=33)
    with pytest.raises(SamplerError, match=r"was not up after `vllm_server_timeout` \(1 s\)"):
        server.start(show_progress=False)
    assert servers.running() == []


def test_supervisor_imports_neither_torch_nor_datasets():
    code = "import sys, spin_trl.generation.vllm.supervise; print('torch' in sys.modules, 'datasets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
