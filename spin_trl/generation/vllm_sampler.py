"""`VLLMSampler`: an opponent played by a vLLM server. Knows the server's limits, not its HTTP API."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .sampler import Completion, CompletionRequest, SamplerError, SamplingParams
from .vllm_api import VLLMServer


class VLLMSampler:
    """
    An [`OpponentSampler`] that asks a stock vLLM server.

    A LoRA opponent is an adapter with a name of its own per run and iteration, so that no cached prefix of an older
    one is ever served. A full opponent replaces the server's weights.

    Args:
        model (`str`): The base model, as the trainer names it.
        lora_rank (`int`, *optional*): Rank of the adapters to come; `None` for full weights.
        served_model (`str`, *optional*): The base model, as the server names it, where that differs.
    """

    reads_checkpoints = True

    def __init__(self, model: str, lora_rank: int | None, served_model: str | None = None):
        self.model = model
        self.lora_rank = lora_rank
        self.served_model = served_model
        self.server: VLLMServer | None = None
        self._run_name: str | None = None
        self._base: dict[str, Any] = {}
        self._playing: str | None = None
        self._published: str | None = None

    def connect(self, server: VLLMServer, run_name: str, min_context_length: int) -> None:
        """
        Wait for the server and see that it can play this run.

        Args:
            server ([`VLLMServer`]): The server. [`close`] closes the connection to it.
            run_name (`str`): Distinguishes the adapters of this run from those of others on the same server.
            min_context_length (`int`): Tokens that must at least fit: the shortest prompt and one more.

        Raises:
            `SamplerError`: no answer, another model, too short a context, or no way to publish an opponent.
        """
        self.server, self._run_name = server, run_name
        self.server.wait_until_ready()
        self._base = self._find_base_model()
        if not isinstance(self._base.get("max_model_len"), int):
            raise SamplerError(
                f"The server at {self.server.base_url} serves {self._base['id']!r} without saying how long its context "
                "is, as a vLLM server does in `max_model_len`. Start one with `python -m spin_trl.serve "
                f"{self.model}`, or correct `vllm_server_base_url`."
            )
        if self.context_length < min_context_length:
            raise SamplerError(
                f"The vLLM server at {self.server.base_url} has a context of {self.context_length} tokens, but at "
                f"least {min_context_length} are needed for the shortest prompt and its answer. Start it with a "
                "larger `--max-model-len`."
            )
        if self.lora_rank is not None:
            refusal, remedy = self.server.adapter_refusal(), f" --lora-rank {self.lora_rank}"
            purpose = "load the LoRA adapters of the opponents"
        else:
            refusal, remedy = self.server.reload_refusal(), ""
            purpose = "load the weights of the opponents"
        if refusal is not None:
            raise SamplerError(
                f"The vLLM server at {self.server.base_url} cannot {purpose}: {refusal}. Start it with `python -m "
                f"spin_trl.serve {self.model}{remedy}`, which sets every flag and variable needed (`--print` shows "
                "them)."
            )

    @property
    def context_length(self) -> int:
        """Number of tokens, prompt and completion, that the server can hold."""
        return self._base["max_model_len"]

    def publish(self, iteration: int, checkpoint: Path | None) -> None:
        if self.lora_rank is None:
            # At iteration 0 the server may still hold what an earlier run left there.
            self.server.reload_weights(str(checkpoint or self._base["root"]))
            return
        name = self._adapter_name(iteration)
        loaded = {model["id"] for model in self.server.served_models()}
        if name in loaded:
            self.server.unload_adapter(name)
        if checkpoint is not None:
            self.server.load_adapter(name, str(checkpoint))
            if self._published != name and self._published in loaded:
                self.server.unload_adapter(self._published)
            self._published = name

    def select(self, iteration: int, checkpoint: Path | None) -> None:
        if self.lora_rank is None or checkpoint is None:
            self._playing = self._base["id"]
        else:
            self._playing = self._adapter_name(iteration)

    def sample(
        self, requests: Iterable[CompletionRequest], params: SamplingParams, logprobs: bool = False
    ) -> Iterator[Completion]:
        bodies = ((request.key, self._body(request, params, logprobs)) for request in requests)
        for key, choice in self.server.complete(bodies):
            yield Completion(
                key=key,
                token_ids=choice["token_ids"],
                finish_reason=choice["finish_reason"],
                logprobs=choice["logprobs"]["token_logprobs"] if logprobs else None,
            )

    def close(self) -> None:
        if self.server is not None:
            self.server.close()
            self.server = None

    def _adapter_name(self, iteration: int) -> str:
        return f"{self._run_name}-iteration-{iteration}"

    def _body(self, request: CompletionRequest, params: SamplingParams, logprobs: bool) -> dict[str, Any]:
        body = {
            "model": self._playing,
            "prompt": request.prompt_ids,
            "seed": request.seed,
            "max_tokens": min(params.max_completion_length, self.context_length - len(request.prompt_ids)),
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": params.min_p or 0.0,
            "repetition_penalty": params.repetition_penalty,
            "stop_token_ids": list(params.end_token_ids),
            "return_token_ids": True,
        }
        if logprobs:
            body["logprobs"] = 0
        return {**body, **params.extra}

    def _find_base_model(self) -> dict[str, Any]:
        wanted = self.served_model or self.model
        bases = [model for model in self.server.served_models() if model.get("parent") is None]
        for base in bases:
            if _same_model(wanted, base["id"]) or _same_model(wanted, base.get("root") or ""):
                return base
        raise SamplerError(
            f"The vLLM server at {self.server.base_url} serves {[base['id'] for base in bases]}, not {wanted!r}. Start "
            f"it with `python -m spin_trl.serve {self.model}`; if it is the same model under another name, set "
            "`vllm_server_model` to the server's name for it."
        )


def _same_model(wanted: str, found: str) -> bool:
    """Whether two names may mean one model. A hub id and a local copy may; the publish check has the last word."""
    if Path(wanted).is_dir() and Path(found).is_dir():
        return Path(wanted).samefile(found)
    return bool(found) and Path(wanted).name == Path(found).name
