"""`Turns`: server and policy on one GPU, one at a time. Knows nothing of HTTP, tensors and pairs.

The server has the GPU while opponents answer, the policy while it trains and scores.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

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


@dataclass
class Turns:
    """
    Whose turn it is. Every process calls the same methods in the same order.

    Args:
        server_sleeps (`bool`): Whether the server frees its memory in the policy's turn.
        offloader ([`Offloader`], *optional*): Moves the policy away in the server's turn. By default it stays.
    """

    server_sleeps: bool = False
    offloader: Offloader | None = None
    costs: Counter[str] = field(default_factory=Counter)
    _server: ServerRest | None = None  # on the main process, once there is one

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
            on_every_process(lambda: self._change("offload", self.offloader.offload, "policy"))
        if self.server_sleeps:
            on_main_process(lambda: self._server and self._change("wake", self._server.wake))

    def give_to_policy(self, briefly: bool = False) -> None:
        """
        From now on the policy may be used, and the server must not be asked.

        Args:
            briefly (`bool`): Whether the server goes on with the same opponent afterwards. It then makes way only if
                the policy had to, and only if that is a matter of seconds.
        """

        def rest() -> int:
            used_before = _gpu_memory_in_use()
            self._server.nap() if briefly else self._server.sleep()
            return used_before - _gpu_memory_in_use()

        if self.server_sleeps and not (briefly and self.offloader is None):
            on_main_process(lambda: self._server and self._change("sleep", rest, "server"))
        if self.offloader is not None:
            on_every_process(lambda: self._change("reload", self.offloader.reload))

    def take_costs(self) -> dict[str, float]:
        """What it has cost and brought on this process since last asked: seconds, gigabytes (10^9 bytes) freed."""
        costs, self.costs = dict(self.costs), Counter()
        return costs

    def _change(self, what: str, change: Callable[[], int | None], frees: str | None = None) -> None:
        started = time.monotonic()
        num_bytes = change()
        self.costs[f"seconds_{what}"] += time.monotonic() - started
        if frees and num_bytes > 0:  # not where it had made way before, nor where there is no GPU to look at
            self.costs[f"gigabytes_freed_by_{frees}"] = num_bytes / 10**9
            logger.info(f"The {frees} has freed {num_bytes / 10**9:.2f} GB for the other.")


def _gpu_memory_in_use() -> int:
    """Bytes of this process's GPU that any process uses; 0 without one."""
    if PartialState().device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def check_turns(args: SPINConfig, mode: str, sharding: Sharding, quantization: Quantization | None) -> None:
    """Raises `ValueError` if, with a sampler of this mode, something cannot take turns that is to."""
    if args.vllm_sleep and mode != "managed":
        found = "no server generates" if mode == "in-process" else "`vllm_server_base_url` names one that runs already"
        raise ValueError(
            f"`vllm_sleep=True` puts a server to sleep that the run has started itself, but {found}. Set "
            "`use_vllm=True`, without `vllm_server_base_url`, or leave `vllm_sleep` unset."
        )
    if not args.offload_policy_during_generation:
        return
    if mode == "in-process":
        found = "contradicts in-process generation, in which the policy answers. Leave it unset, or use a vLLM server."
    elif sharding.engine is not None:
        own = "DeepSpeed's own `offload_optimizer`" if sharding.engine == "deepspeed" else "FSDP's own `offload_params`"
        found = f"moves whole tensors, but {sharding} holds shards of its own. Leave it unset, and use {own}."
    elif quantization is not None and not quantization.is_4bit:
        found = (
            "moves weights that are plain, or quantized to 4 bits by bitsandbytes, but these are quantized otherwise. "
            "Leave it unset, and lower `vllm_gpu_memory_utilization`."
        )
    else:
        return
    raise ValueError(f"`offload_policy_during_generation=True` {found}")
