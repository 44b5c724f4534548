"""`VLLMSampler`: an opponent played by a vLLM server. Knows the server's limits, not its HTTP API."""

import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from ..sampler import Completion, CompletionRequest, SamplerError, SamplingParams
from .attempts import Progress
from .errors import UnknownModelError
from .http_api import VLLMServer
from .publishers import AdapterPublisher, OpponentLostError, Publisher, WeightsPublisher
from .read_answer import read_completion


logger = logging.getLogger(__name__)

_MAX_NUM_LOSSES = 3  # in a row, without one completion in between
# Completions are held back until the server is seen to be still the one that the opponent was published to.
_NUM_BETWEEN_CONFIRMATIONS = 256
_SECONDS_BETWEEN_CONFIRMATIONS = 5.0


class VLLMSampler:
    """
    An [`OpponentSampler`] that asks a stock vLLM server.

    A LoRA opponent is an adapter with a name of its own per run and iteration, so that no cached prefix of an older
    one is ever served; earlier ones stay loaded beside it where requests are for them. A full opponent replaces the
    server's weights. A server that loses opponents, because it is restarted, gets them again, and what is in doubt is
    asked for again.

    Args:
        model (`str`): The base model, as the trainer names it.
        lora_rank (`int`, *optional*): Rank of the adapters to come; `None` for full weights.
        served_model (`str`, *optional*): The base model, as the server names it, where that differs.
        vocab_size (`int`, *optional*): Number of the model's token ids, where it is known: no others are accepted.
    """

    reads_checkpoints = True

    def __init__(
        self, model: str, lora_rank: int | None, served_model: str | None = None, vocab_size: int | None = None
    ):
        self.model = model
        self.lora_rank = lora_rank
        self.served_model = served_model
        self.vocab_size = vocab_size
        self.server: VLLMServer | None = None
        self._publisher: Publisher | None = None
        self._base: dict[str, Any] = {}
        self._newest = 0
        self._opponents: dict[int, Path | None] = {}  # iteration -> checkpoint, the newest last
        self._names: dict[int, str] = {}  # iteration -> what the server calls its opponent

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
        self.server = server
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
        self._publisher = (WeightsPublisher if self.lora_rank is None else AdapterPublisher)(server, run_name)

    @property
    def base_url(self) -> str:
        """Address of the server."""
        return self.server.base_url

    @property
    def context_length(self) -> int:
        """Number of tokens, prompt and completion, that the server can hold."""
        return self._base["max_model_len"]

    def require_noticing_restarts(self) -> None:
        """
        Raises:
            `SamplerError`: if the server could miss an opponent and play on with an older one. Where several servers
                play, one may be away while an opponent is published.
        """
        if not self._publisher.notices_restarts:
            raise SamplerError(
                f"The vLLM server at {self.base_url} does not let its workers be marked, so it could play an old "
                "opponent unnoticed where several servers play. Update vLLM, or name one address in "
                "`vllm_server_base_url`."
            )

    @property
    def plays_several(self) -> bool:
        """Whether earlier opponents can be published beside the newest: adapters can, weights replace each other."""
        return self.lora_rank is not None

    def publish(
        self, iteration: int, checkpoint: Path | None, earlier: Mapping[int, Path | None] | None = None
    ) -> None:
        self._publisher.publish(iteration, checkpoint, self._base, earlier or {})

    def select(self, iteration: int, checkpoint: Path | None, earlier: Mapping[int, Path | None] | None = None) -> None:
        self._newest = iteration
        self._opponents = {**(earlier or {}), iteration: checkpoint}
        self._names = {i: self._publisher.select(i, path, self._base) for i, path in self._opponents.items()}

    def sample(
        self, requests: Iterable[CompletionRequest], params: SamplingParams, logprobs: bool = False
    ) -> Iterator[Completion]:
        source = enumerate(requests)
        outstanding: dict[int, CompletionRequest] = {}  # taken from the source, and not answered beyond doubt
        progress = Progress(self.server.progress_timeout)
        num_losses = 0
        while True:
            try:
                numbered = itertools.chain(list(outstanding.items()), source)
                for completion in self._confirmed(numbered, outstanding, params, logprobs, progress):
                    num_losses = 0
                    yield completion
                return
            except (OpponentLostError, UnknownModelError) as loss:
                num_losses += 1
                self._restore(num_losses, len(outstanding), loss)

    def sample_each(
        self, requests: list[CompletionRequest], params: SamplingParams, logprobs: bool = False
    ) -> dict[str, list[Completion]]:
        return {self.base_url: list(self.sample(requests, params, logprobs))}

    def close(self) -> None:
        if self.server is None:
            return
        if self._publisher is not None:
            self._publisher.withdraw()
        self.server.close()
        self.server = None

    def _confirmed(
        self,
        requests: Iterable[tuple[int, CompletionRequest]],
        outstanding: dict[int, CompletionRequest],
        params: SamplingParams,
        logprobs: bool,
        progress: Progress,
    ) -> Iterator[Completion]:
        """Completions that are the opponent's beyond doubt. `outstanding` is kept up to date."""

        def bodies() -> Iterator[tuple[tuple[int, dict], dict]]:
            for number, request in requests:
                outstanding[number] = request
                body = self._body(request, params, logprobs)
                yield (number, body), body

        if self._publisher.needs_confirmation:
            self._publisher.confirm()  # saves the completions of a server that was restarted meanwhile
        held_back: dict[int, Completion] = {}
        confirmed_at = time.monotonic()
        with closing(self.server.complete(bodies(), progress)) as answers:
            for (number, body), choice in answers:
                request, max_tokens = outstanding[number], body["max_tokens"]
                completion = read_completion(choice, request, params, max_tokens, self.vocab_size, logprobs)
                held_back[number] = completion
                if (
                    not self._publisher.needs_confirmation
                    or len(held_back) >= _NUM_BETWEEN_CONFIRMATIONS
                    or time.monotonic() > confirmed_at + _SECONDS_BETWEEN_CONFIRMATIONS
                ):
                    yield from self._release(held_back, outstanding)
                    confirmed_at = time.monotonic()
        yield from self._release(held_back, outstanding)

    def _release(
        self, held_back: dict[int, Completion], outstanding: dict[int, CompletionRequest]
    ) -> Iterator[Completion]:
        if held_back:
            self._publisher.confirm()
        for number in list(held_back):
            del outstanding[number]
            yield held_back.pop(number)

    def _restore(self, num_losses: int, num_outstanding: int, loss: Exception) -> None:
        """Publish the opponent again, on a server that has lost it."""
        iteration = self._newest
        if num_losses > _MAX_NUM_LOSSES:
            raise SamplerError(
                f"The vLLM server at {self.server.base_url} lost iteration {iteration}'s opponent {num_losses} times "
                f"in a row without one completion in between. The last time: {loss}. See its log for why it is "
                "restarted, and see that no other run publishes to it."
            ) from loss
        logger.warning(
            f"The vLLM server at {self.server.base_url} has lost iteration {iteration}'s opponent: {loss}. It is "
            f"published again, and {num_outstanding} completion(s) are asked for again."
        )
        self.server.wait_until_ready()
        self._base = self._find_base_model()
        for opponent, checkpoint in self._opponents.items():
            self._publisher.restore(opponent, checkpoint, self._base)

    def _body(self, request: CompletionRequest, params: SamplingParams, logprobs: bool) -> dict[str, Any]:
        body = {
            "model": self._names[self._newest if request.opponent is None else request.opponent],
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
