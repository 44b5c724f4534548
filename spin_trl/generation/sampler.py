"""The protocol between the self-play and whatever makes an opponent's completions."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class SamplingParams:
    """
    How to sample a completion. Every field is always sent, so that no server's defaults slip in.

    Args:
        max_completion_length (`int`): Maximum number of tokens, the end token included.
        end_token_ids (`tuple[int, ...]`): Token ids at which a completion ends. The one sampled is its last id.
        temperature (`float`): 0 is greedy decoding.
        extra (`dict[str, Any]`): Further parameters in the sampler's own terms. They win.
    """

    max_completion_length: int
    end_token_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CompletionRequest:
    """
    One prompt to complete.

    Args:
        key (`tuple[int, int]`): Row and sample, to know the answer by.
        prompt_ids (`list[int]`): Its token ids.
        seed (`int`): Of the sampling.
        opponent (`int`, *optional*): Number of the iteration whose opponent is to answer, where several are published.
            By default the newest. A sampler that plays one at a time does not look at it.
    """

    key: tuple[int, int]
    prompt_ids: list[int]
    seed: int
    opponent: int | None = None


@dataclass(frozen=True)
class Completion:
    """
    An answer, as sampled.

    Args:
        key (`tuple[int, int]`): The request's.
        token_ids (`list[int]`): Ends in the sampled end token if and only if `finish_reason` is `"stop"`.
        finish_reason (`str`): `"stop"`, or `"length"` if the answer was cut off.
        logprobs (`list[float]`, *optional*): Log-prob of each token under the opponent at temperature 1, in nats.
    """

    key: tuple[int, int]
    token_ids: list[int]
    finish_reason: str
    logprobs: list[float] | None = None


class OpponentSampler(Protocol):
    """
    Answers prompts as a published opponent. Pass one of your own to [`SPINTrainer`] as `sampler`.

    A class that inherits from this one needs `publish` and `sample` alone; see `docs/samplers.md`. In every iteration
    `publish` is called first, then `select`, then `sample` any number of times, for different prompts and parameters.
    An error that one of them raises ends the run on all processes.
    """

    # Whether opponents are saved to disk and passed to `publish` as folders. If not, the policy's weights are never
    # written for the sampler, and the log-probs that it gives are not compared with the policy's.
    reads_checkpoints: bool = True
    # Whether earlier opponents can be published beside the newest, and each request says who is to answer. If not, one
    # after the other is published where `num_opponents` asks for several.
    plays_several: bool = False

    @abstractmethod
    def publish(
        self, iteration: int, checkpoint: Path | None, earlier: Mapping[int, Path | None] | None = None
    ) -> None:
        """
        Make the opponent of `iteration` available. Called on the main process only, while the others wait.

        Args:
            iteration (`int`): Number of the iteration, from 0.
            checkpoint (`Path`, *optional*): Folder in which the opponent was saved: a PEFT adapter where the run trains
                one, else a whole model. `None` for the base model, and where `reads_checkpoints` is false.
            earlier (`dict[int, Path]`, *optional*): Further opponents and their folders, in the same manner. Only
                where `plays_several` is true.
        """

    def select(self, iteration: int, checkpoint: Path | None, earlier: Mapping[int, Path | None] | None = None) -> None:
        """Play the opponent of `iteration` from now on. Called on every process, with what was published."""

    @abstractmethod
    def sample(
        self, requests: Iterable[CompletionRequest], params: SamplingParams, logprobs: bool = False
    ) -> Iterator[Completion]:
        """
        Complete the prompts. Called on every process, with that process's own share of them.

        Args:
            requests (iterable of [`CompletionRequest`]): Read lazily: take only as many as there is room for.
            params ([`SamplingParams`]): How to sample.
            logprobs (`bool`): Whether each completion needs its `logprobs`.

        Returns:
            An iterator over one [`Completion`] for each request, in any order. It is closed early where a run ends.

        Raises:
            [`SamplerError`]: if a completion cannot be had.
        """

    def sample_each(
        self, requests: list[CompletionRequest], params: SamplingParams, logprobs: bool = False
    ) -> dict[str, list[Completion]]:
        """
        What each of those that play the opponent, such as several servers, answers to the same prompts, by its name.
        Called on the main process, with `logprobs`, to see that the opponent published is the one that plays. Not
        called where `reads_checkpoints` is false, or with `publish_check_tolerance=None`.
        """
        return {type(self).__name__: list(self.sample(requests, params, logprobs))}

    def close(self) -> None:
        """Free what the sampler holds. Called on every process when a `train()` ends; another may follow."""


class SamplerError(RuntimeError):
    """The opponent cannot be played: the message says what was asked, what came back and what to do."""
