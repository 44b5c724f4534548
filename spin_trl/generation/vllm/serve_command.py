"""The `vllm serve` command that self-play needs: every flag and variable, in one place. Starts nothing."""

import importlib.metadata
import importlib.util
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass


# Ranks for which vLLM compiles its LoRA kernels; `--max-lora-rank` takes no other.
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class ServeCommand:
    """
    A command line and the environment variables to set for it.

    `can_sleep` says whether `POST /sleep` makes the server free its memory. The answer to it does not tell: a server
    that was not started for it, and the CPU build, say 200 and free nothing.
    """

    argv: list[str]
    env: dict[str, str]
    can_sleep: bool = False

    def __str__(self) -> str:
        """The command as one would type it in a shell."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.env.items()]
        return " ".join([*variables, shlex.join(self.argv)])


def serve_command(
    model: str, arguments: Sequence[str] = (), lora_rank: int | None = None, sleep_mode: bool = False
) -> ServeCommand:
    """
    Build the command that serves `model` so that opponents can be published to it.

    Args:
        model (`str`): Hub id or folder of the base model.
        arguments (`Sequence[str]`): Further ones for `vllm serve`, such as `["--port", "8000"]`.
        lora_rank (`int`, *optional*): Largest rank of the adapters to come. `None` serves full weights.
        sleep_mode (`bool`): Whether the server is to free its memory when it is told to, where vLLM can.

    Raises:
        `ValueError`: if `lora_rank` is larger than any that vLLM can serve.
    """
    launcher, on_cpu = _launcher(model)
    # A model's own generation_config must not change how an opponent is sampled.
    argv = [*launcher, "--generation-config", "vllm", "--disable-uvicorn-access-log"]
    env = {}
    if lora_rank is None:
        env["VLLM_SERVER_DEV_MODE"] = "1"  # for `reload_weights`
    else:
        argv += ["--enable-lora", "--max-lora-rank", str(_max_lora_rank(lora_rank))]
        env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        # Under data parallelism vLLM answers from several processes, and only the one that loads an adapter knows it.
        if _has_flag(arguments, "--data-parallel-size", "-dp"):
            argv += ["--api-server-count", "1"]
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
    return ServeCommand([*argv, *arguments], env, can_sleep)


def _has_flag(arguments: Sequence[str], *names: str) -> bool:
    return any(word.partition("=")[0].replace("_", "-") in names for word in arguments)


def can_serve() -> bool:
    """Whether vLLM is installed in this environment. It is not imported."""
    return importlib.util.find_spec("vllm") is not None


def _launcher(model: str) -> tuple[list[str], bool]:
    """The words that start vLLM's server, and whether it is the CPU build, which needs other words."""
    version = _version("vllm")
    if version is None and _version("vllm-cpu") is not None:
        # The CPU build's `vllm` command looks for a distribution of its own name and fails.
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model], True
    return [shutil.which("vllm") or "vllm", "serve", model], "cpu" in (version or "")


def _version(distribution: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(distribution)
    return None


def _max_lora_rank(rank: int) -> int:
    for served in _LORA_RANKS:
        if rank <= served:
            return served
    raise ValueError(f"vLLM serves LoRA adapters up to rank {_LORA_RANKS[-1]}, got rank {rank}. Use a smaller `r`.")
