"""`Turns`: server and policy on one GPU, one at a time. Knows nothing of HTTP, tensors and pairs.

The server has the GPU while opponents answer, the policy while it trains and scores.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.logging import get_logger

from ..generation.vllm.rest import ServerRest
from ..policy.offload import Offloader
from ..policy.quantization import Quantization
from ..policy.sharding import Sharding
from ..processes.ranks import on_every_process, on_main_process
from ..spin_config import SPINConfig


logger = get_logger(__name__)

_GIGABYTE = 10**9  # bytes


class Turns:
    """
    Whose turn it is. Every process calls the same methods in the same order.

    Args:
        server_sleeps (`bool`): Whether the server frees its memory in the policy's turn.
        offloader ([`Offloader`], *optional*): Moves the policy away in the server's turn. By default it stays.

    `costs` holds what changing turns has cost and brought on this process since [`take_costs`]: seconds, and gigabytes
    (10^9 bytes) freed the last time.
    """

    def __init__(self, server_sleeps: bool = False, offloader: Offloader | None = None):
        self.server_sleeps = server_sleeps
        self.offloader = offloader
        self.costs: Counter[str] = Counter()
        self._server: ServerRest | None = None  # on the main process, once there is one

    def begin(self, server: ServerRest | None) -> None:
        """The server, if there is one that can rest, has been started, and has the first turn."""
        self._server = server
        if server is not None:
            PartialState().print(f"While the policy trains, the vLLM server {server}.")

    def end(self) -> None:
        """There is no server any more, for whatever reason: the policy is to be in its place."""
        self._server = None
        if self.offloader is not None:
            self.offloader.reload()

    def give_to_server(self) -> None:
        """From now on the server may be asked, and the policy must not be used."""
        if self.offloader is not None:
            on_every_process(self._offload)
        if self.server_sleeps:
            on_main_process(self._wake)

    def give_to_policy(self, briefly: bool = False) -> None:
        """
        From now on the policy may be used, and the server must not be asked.

        Args:
            briefly (`bool`): Whether the server goes on with the same opponent afterwards. It then makes way only if
                the policy had to, and only if that is a matter of seconds.
        """
        if self.server_sleeps and not (briefly and self.offloader is None):
            on_main_process(lambda: self._rest(briefly))
        if self.offloader is not None:
            on_every_process(self._reload)

    def take_costs(self) -> dict[str, float]:
        """The costs so far, which start at nothing again."""
        costs, self.costs = dict(self.costs), Counter()
        return costs

    def _wake(self) -> None:
        if self._server is not None:
            with self._timed("wake"):
                self._server.wake()

    def _rest(self, briefly: bool) -> None:
        if self._server is None:
            return
        used_before = _gpu_memory_in_use()
        with self._timed("sleep"):
            self._server.nap() if briefly else self._server.sleep()
        self._note_freed("server", used_before - _gpu_memory_in_use())

    def _offload(self) -> None:
        with self._timed("offload"):
            self._note_freed("policy", self.offloader.offload())

    def _reload(self) -> None:
        with self._timed("reload"):
            self.offloader.reload()

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.costs[f"seconds_{what}"] += time.monotonic() - started

    def _note_freed(self, what: str, num_bytes: int) -> None:
        if num_bytes > 0:  # not where it had made way before, nor where there is no GPU to look at
            self.costs[f"gigabytes_freed_by_{what}"] = num_bytes / _GIGABYTE
            logger.info(f"The {what} has freed {num_bytes / _GIGABYTE:.2f} GB for the other.")


def _gpu_memory_in_use() -> int:
    """Bytes of this process's GPU that any process uses; 0 without one."""
    if PartialState().device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def check_turns(args: SPINConfig, mode: str, sharding: Sharding | None, quantization: Quantization | None) -> None:
    """
    Refuse what could not take turns, before a model is loaded.

    Args:
        mode (`str`): Of the sampler, see [`SamplerChoice`].
        sharding ([`Sharding`], *optional*): What is spread over processes.
        quantization ([`Quantization`], *optional*): How the policy's weights are quantized.

    Raises:
        `ValueError`: naming the setting and what it contradicts.
    """
    if args.vllm_sleep and mode != "managed":
        found = "no server generates" if mode == "in-process" else "`vllm_server_base_url` names one that runs already"
        raise ValueError(
            f"`vllm_sleep=True` puts a server to sleep that the run has started itself, but {found}. Set "
            "`use_vllm=True`, without `vllm_server_base_url`, or leave `vllm_sleep` unset."
        )
    if not args.offload_policy_during_generation:
        return
    name = "`offload_policy_during_generation=True`"
    if mode == "in-process":
        raise ValueError(
            f"{name} contradicts in-process generation, in which the policy itself answers. Use a vLLM server, or "
            "leave it unset."
        )
    if sharding is not None:
        remedy = (
            "DeepSpeed's own `offload_optimizer`" if sharding.engine == "deepspeed" else "FSDP's own `offload_params`"
        )
        raise ValueError(
            f"{name} moves whole tensors, but {sharding} holds the weights in shards of its own. Leave it unset, and "
            f"use {remedy} or a server on another GPU."
        )
    if quantization is not None and not quantization.is_4bit:
        raise ValueError(
            f"{name} moves weights that are plain, or quantized to 4 bits by bitsandbytes, but these are quantized "
            "otherwise, and may be held elsewhere too. Leave it unset, and lower `vllm_gpu_memory_utilization` until "
            "both fit."
        )
