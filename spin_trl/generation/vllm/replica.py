"""`Replica`: one vLLM server that plays a run's opponents, how they get there, and how it is noticed that it lost them.

Knows the server's limits, not its HTTP API.
"""

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..sampler import Completion, CompletionRequest, SamplerError, SamplingParams
from .completion import completion_body, read_completion
from .http_api import UnknownModelError, UnreachableError, VLLMServer


logger = logging.getLogger(__name__)

# Opponents by the number of their iteration, the newest last: their checkpoints, `None` for the base model.
Opponents = Mapping[int, Path | None]


class OpponentLostError(Exception):
    """The server may not be playing the opponent any more: it was restarted, or somebody else loaded other weights."""


@dataclass
class Replica:
    """
    A server, and what of the run is on it.

    Args:
        server ([`VLLMServer`]): The server.
        run_name (`str`): Distinguishes the opponents of this run from those of others on the same server.
        model (`str`): The base model, as the trainer names it.
        served_model (`str`, *optional*): The base model, as the server names it, where that differs.
        vocab_size (`int`, *optional*): Number of the model's token ids, where it is known: no others are accepted.
        lora_rank (`int`, *optional*): Rank of the adapters to come.
    """

    server: VLLMServer
    run_name: str
    model: str
    served_model: str | None
    vocab_size: int | None
    lora_rank: int | None

    def __post_init__(self):
        self.num_losses = 0  # of the opponent, since the last completion
        self.problem = ""  # why the server was last not there
        self.gone_since = math.inf  # when it was first found gone, if it has not been well since
        self._base: dict[str, Any] = {}  # the base model, as the server lists it

    @property
    def address(self) -> str:
        return self.server.base_url

    @property
    def context_length(self) -> int:
        """Number of tokens, prompt and completion, that the server can hold."""
        return self._base["max_model_len"]

    async def connect(self, min_context_length: int) -> None:
        """
        Wait for the server and see that it can play this run.

        Args:
            min_context_length (`int`): Tokens that must at least fit: the shortest prompt and one more.

        Raises:
            `SamplerError`: no answer, another model, too short a context, or no way to publish an opponent.
        """
        await self._find_base_model()
        if self.context_length < min_context_length:
            raise SamplerError(
                f"The vLLM server at {self.address} has a context of {self.context_length} tokens, but at least "
                f"{min_context_length} are needed for the shortest prompt and its answer. Start it with a larger "
                "`--max-model-len`."
            )
        await self._require_loading()

    async def ensure(self, opponents: Opponents) -> None:
        """Have the server play these opponents, and load what it does not have: after a restart it has none."""
        await self._find_base_model()
        await self._load(opponents)

    async def complete(
        self, request: CompletionRequest, opponents: Opponents, params: SamplingParams, logprobs: bool
    ) -> Completion:
        """
        The opponent's answer.

        Raises:
            [`OpponentLostError`]: if the server has not had the opponent all the time since `ensure`.
        """
        iteration = list(opponents)[-1] if request.opponent is None else request.opponent
        name = self._name(iteration, opponents[iteration])
        body = completion_body(name, request, params, self.context_length, logprobs)
        try:
            choice = await self.server.complete(body)
        except UnknownModelError as error:
            raise OpponentLostError(str(error)) from error
        await self._confirm()
        return read_completion(choice, request, params, body["max_tokens"], self.vocab_size, logprobs)

    async def withdraw(self) -> None:
        """Free what is left on the server, if that is easy."""

    # Whether it can be counted on

    def is_gone(self, error: Exception) -> None:
        self.problem = str(error)
        if self.gone_since == math.inf:
            self.gone_since = time.monotonic()
            logger.warning(
                f"The vLLM server at {self.address} is left out until it is back; its prompts go to the others. {error}"
            )

    def is_well(self) -> None:
        self.num_losses = 0
        if self.gone_since < math.inf:
            self.gone_since = math.inf
            logger.warning(f"The vLLM server at {self.address} is back.")

    async def _confirm(self) -> None:
        """Raise [`OpponentLostError`] unless the server has played the opponent until now."""

    def _name(self, iteration: int, checkpoint: Path | None) -> str:
        """The model to ask the server for."""
        raise NotImplementedError

    async def _load(self, opponents: Opponents) -> None:
        raise NotImplementedError

    async def _require_loading(self) -> None:
        """Raise [`SamplerError`] if opponents cannot be loaded at run time."""
        raise NotImplementedError

    def _cannot_load(self, what: str, refusal: str, options: str) -> SamplerError:
        return SamplerError(
            f"The vLLM server at {self.address} cannot load the {what} of the opponents: {refusal}. Start it with "
            f"`python -m spin_trl.serve {self.model}{options}`, which sets every flag and variable needed (`--print` "
            "shows them)."
        )

    async def _find_base_model(self) -> None:
        await self.server.wait_until_ready()
        wanted = self.served_model or self.model
        bases = [model for model in await self.server.served_models() if model.get("parent") is None]
        for base in bases:
            if _same_model(wanted, base["id"]) or _same_model(wanted, base.get("root") or ""):
                self._base = base
                return
        raise SamplerError(
            f"The vLLM server at {self.address} serves {[base['id'] for base in bases]}, not {wanted!r}. Start it with "
            f"`python -m spin_trl.serve {self.model}`; if it is the same model under another name, set "
            "`vllm_server_model` to the server's name for it."
        )


class AdapterReplica(Replica):
    """
    A [`Replica`] that plays LoRA adapters, with names of their own per run and iteration, so that no cached prefix of
    an older one is ever served, and a server that has lost one says so when it is asked for.
    """

    _held: frozenset[str] = frozenset()

    async def withdraw(self) -> None:
        for name in self._held:
            await self.server.unload_adapter(name)

    def _name(self, iteration: int, checkpoint: Path | None) -> str:
        return self._base["id"] if checkpoint is None else f"{self.run_name}-iteration-{iteration}"

    async def _load(self, opponents: Opponents) -> None:
        wanted = {self._name(i, path): str(path) for i, path in opponents.items() if path is not None}
        loaded = {model["id"] for model in await self.server.served_models()}
        for name in wanted.keys() - loaded:
            await self.server.load_adapter(name, wanted[name])
        if wanted:  # beside the base model alone they do no harm
            for name in self._held - wanted.keys():
                await self.server.unload_adapter(name)
            self._held = frozenset(wanted)

    async def _require_loading(self) -> None:
        if (refusal := await self.server.adapter_refusal()) is not None:
            raise self._cannot_load("LoRA adapters", refusal, f" --lora-rank {self.lora_rank}")


class WeightsReplica(Replica):
    """
    A [`Replica`] that plays full opponents, which replace the server's weights.

    A server that was restarted plays the base model again and says nothing. So what it keeps as the version of its
    weights tells the run, the iteration and the loading: while it is there, so are the weights. Where several processes
    load them at once, the last to begin ends it, and the others wait for that.
    """

    def __post_init__(self):
        super().__post_init__()
        self._version: str | None = None
        self._token = secrets.token_hex(8)  # this process's
        self._looking = asyncio.Lock()
        self._looked_at = 0.0

    async def _confirm(self) -> None:
        called_at = time.monotonic()
        async with self._looking:
            if self._looked_at >= called_at:  # what comes back during one look is confirmed by the next, all at once
                return
            looked_at = time.monotonic()
            if await self.server.weight_version() != self._version:
                raise OpponentLostError("its weights are no longer those of the opponent")
            self._looked_at = looked_at

    def _name(self, iteration: int, checkpoint: Path | None) -> str:
        return self._base["id"]

    async def _load(self, opponents: Opponents) -> None:
        iteration, checkpoint = list(opponents.items())[-1]
        loading, loaded = (f"{self.run_name}-iteration-{iteration}:{state}:" for state in ("loading", "loaded"))
        waits_until = time.monotonic() + self.server.request_timeout
        while (version := await self.server.weight_version()).startswith(loading) and time.monotonic() < waits_until:
            if version.startswith(loading + self._token):  # an attempt of its own that failed
                break
            await asyncio.sleep(self.server.delay)
        if not version.startswith(loaded):
            own = self._token + secrets.token_hex(8)
            version = loaded + own
            await self._replace(str(checkpoint or self._base["root"]), loading + own, version)
        self._version = version

    async def _replace(self, path: str, loading: str, loaded: str) -> None:
        """Load weights, and say so unless the server was restarted meanwhile, or somebody else loads some."""
        await self._mark(loading)
        try:
            await self.server.reload_weights(path)
        except UnreachableError:
            raise
        except SamplerError:
            if await self.server.weight_version() == loading:  # the server lives, and does not want these weights
                raise
        if await self.server.weight_version() != loading:
            raise OpponentLostError(f"it was restarted, or got other weights, before {path} was in place")
        await self._mark(loaded)

    async def _mark(self, version: str) -> None:
        try:
            await self.server.set_weight_version(version)
        except UnreachableError as error:  # by the next attempt it may be another server
            raise OpponentLostError(f"it may have been restarted while its weights were loaded. {error}") from error

    async def _require_loading(self) -> None:
        if (refusal := await self.server.reload_refusal()) is not None:
            raise self._cannot_load("weights", refusal, "")


def _same_model(wanted: str, found: str) -> bool:
    """Whether two names may mean one model. A hub id and a local copy may; the publish check has the last word."""
    if Path(wanted).is_dir() and Path(found).is_dir():
        return Path(wanted).samefile(found)
    return bool(found) and Path(wanted).name == Path(found).name
