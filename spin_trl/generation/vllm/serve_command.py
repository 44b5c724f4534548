"""The `vllm serve` command that self-play needs: every flag and variable, in one place. Starts nothing."""

import importlib.metadata
import importlib.util
import shlex
import shutil
import sys
from dataclasses import dataclass


# Ranks for which vLLM compiles its LoRA kernels; `--max-lora-rank` takes no other.
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class ServeCommand:
    """
    A command line and the environment variables to set for it.

    Args:
        argv (`list[str]`): The command line.
        env (`dict[str, str]`): The variables.
        can_sleep (`bool`): Whether `POST /sleep` makes the server free its memory. The answer to it does not tell: a
            server that was not started for it, and the CPU build, say 200 and free nothing.
    """

    argv: list[str]
    env: dict[str, str]
    can_sleep: bool = False

    def __str__(self) -> str:
        """The command as one would type it in a shell."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.env.items()]
        return " ".join([*variables, shlex.join(self.argv)])


def serve_command(
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    uds: str | None = None,
    lora_rank: int | None = None,
    max_loras: int = 1,
    max_model_length: int | None = None,
    dtype: str = "auto",
    gpu_memory_utilization: float | None = None,
    tensor_parallel_size: int = 1,
    revision: str | None = None,
    trust_remote_code: bool = False,
    sleep_mode: bool = False,
    extra: list[str] | None = None,
) -> ServeCommand:
    """
    Build the command that serves `model` so that opponents can be published to it.

    Args:
        model (`str`): Hub id or folder of the base model.
        host (`str`): Interface to bind. With full weights anyone who reaches it can make the server load files.
        port (`int`): Port to bind.
        uds (`str`, *optional*): Path of a Unix socket to bind instead.
        lora_rank (`int`, *optional*): Largest rank of the adapters to come. `None` serves full weights.
        max_loras (`int`): Number of adapters that are played at once. vLLM has the prompts of further ones wait.
        max_model_length (`int`, *optional*): Context length in tokens. By default the model's own.
        dtype (`str`): As `vllm serve --dtype`.
        gpu_memory_utilization (`float`, *optional*): Share of the GPU's memory. By default vLLM's own.
        tensor_parallel_size (`int`): Number of GPUs to split the model over.
        revision (`str`, *optional*): Revision of a model from the hub.
        trust_remote_code (`bool`): Whether code that comes with the model is run.
        sleep_mode (`bool`): Whether the server is to free its memory when it is told to, where vLLM can.
        extra (`list[str]`, *optional*): Further arguments for `vllm serve`.

    Returns:
        [`ServeCommand`]

    Raises:
        `ValueError`: if `lora_rank` is larger than any that vLLM can serve.
    """
    launcher, on_cpu = _launcher(model)
    argv = [*launcher, *(["--host", host, "--port", str(port)] if uds is None else ["--uds", uds]), "--dtype", dtype]
    # A model's own generation_config must not change how an opponent is sampled.
    argv += ["--generation-config", "vllm", "--disable-uvicorn-access-log"]
    env = {}
    if lora_rank is not None:
        argv += ["--enable-lora", "--max-lora-rank", str(_max_lora_rank(lora_rank))]
        if max_loras > 1:
            argv += ["--max-loras", str(max_loras)]
        env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        # Under data parallelism vLLM answers from several processes, and only the one that loads an adapter knows it.
        if _has_flag(extra, "--data-parallel-size", "-dp") and not _has_flag(extra, "--api-server-count", "-asc"):
            argv += ["--api-server-count", "1"]
    else:
        env["VLLM_SERVER_DEV_MODE"] = "1"  # for `reload_weights`
    if max_model_length is not None:
        argv += ["--max-model-len", str(max_model_length)]
    if gpu_memory_utilization is not None and not on_cpu:
        argv += ["--gpu-memory-utilization", str(gpu_memory_utilization)]
    if tensor_parallel_size > 1:
        argv += ["--tensor-parallel-size", str(tensor_parallel_size)]
    if revision is not None:
        argv += ["--revision", revision]
    if trust_remote_code:
        argv += ["--trust-remote-code"]
    if on_cpu:
        argv += ["--enforce-eager"]  # there may be no compiler
        # Every completion has a seed. Of one whose prompt is read in two steps, vLLM rewinds the generator, which a
        # CPU's cannot: the engine dies of it ("CPU Generator does not use offset").
        argv += ["--no-enable-chunked-prefill"]
        env["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
    can_sleep = sleep_mode and not on_cpu
    if can_sleep:  # where the platform cannot, as a CPU, vLLM refuses to start with this
        argv += ["--enable-sleep-mode"]
        env["VLLM_SERVER_DEV_MODE"] = "1"  # for `/sleep`
    return ServeCommand(argv + list(extra or []), env, can_sleep)


def _has_flag(arguments: list[str] | None, *names: str) -> bool:
    return any(word.partition("=")[0].replace("_", "-") in names for word in arguments or [])


def can_serve() -> bool:
    """Whether vLLM is installed in this environment. It is not imported."""
    return importlib.util.find_spec("vllm") is not None


def _launcher(model: str) -> tuple[list[str], bool]:
    """The words that start vLLM's server, and whether it is the CPU build, which needs other words."""
    if _is_installed("vllm-cpu") and not _is_installed("vllm"):
        # The CPU build's `vllm` command looks for a distribution of its own name and fails.
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model], True
    version = importlib.metadata.version("vllm") if _is_installed("vllm") else ""
    return [shutil.which("vllm") or "vllm", "serve", model], "cpu" in version


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _max_lora_rank(rank: int) -> int:
    for served in _LORA_RANKS:
        if rank <= served:
            return served
    raise ValueError(f"vLLM serves LoRA adapters up to rank {_LORA_RANKS[-1]}, got rank {rank}. Use a smaller `r`.")
