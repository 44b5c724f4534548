"""`PolicySampler`: an opponent played in-process by the policy itself, with transformers' `generate`."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel

from .sampler import Completion, CompletionRequest, OpponentSampler, SamplingParams


# Requests that are read ahead and sorted by length, in batches: neighbours in length waste little padding.
_NUM_BATCHES_AHEAD = 16


@dataclass
class PolicySampler(OpponentSampler):
    """
    An [`OpponentSampler`] for machines without vLLM. At the start of an iteration the policy is the opponent, so there
    is nothing to publish.

    Args:
        open_policy (`Callable`): Returns a context manager that gives the policy, ready to generate.
        pad_token_id (`int`): Token id to pad prompts with.
        batch_size (`int`): Number of prompts in a batch.
        max_length (`int`): Tokens that a batch's longest prompt and its completion may have together.
    """

    open_policy: Callable[[], AbstractContextManager[PreTrainedModel]]
    pad_token_id: int
    batch_size: int
    max_length: int

    reads_checkpoints = False

    def publish(
        self, iteration: int, checkpoint: Path | None, earlier: Mapping[int, Path | None] | None = None
    ) -> None:
        pass

    def sample(
        self, requests: Iterable[CompletionRequest], params: SamplingParams, logprobs: bool = False
    ) -> Iterator[Completion]:
        if logprobs:
            raise ValueError("The in-process sampler is the policy itself: there is nothing to compare log-probs with.")
        requests = iter(requests)
        # Opened once, even for no request at all: where it is sharded, all processes have to open it together.
        with self.open_policy() as model, _without_defaults_of_its_own(model):
            while ahead := list(itertools.islice(requests, _NUM_BATCHES_AHEAD * self.batch_size)):
                ahead.sort(key=lambda request: len(request.prompt_ids))
                for start in range(0, len(ahead), self.batch_size):
                    yield from self._generate(model, ahead[start : start + self.batch_size], params)

    def _generate(
        self, model: PreTrainedModel, batch: list[CompletionRequest], params: SamplingParams
    ) -> list[Completion]:
        prompts = [torch.tensor(request.prompt_ids) for request in batch]
        pad = partial(pad_sequence, batch_first=True, padding_side="left")
        input_ids = pad(prompts, padding_value=self.pad_token_id)  # (B, P)
        attention_mask = pad([torch.ones_like(prompt) for prompt in prompts])  # (B, P)

        # The seed is of the batch, and training's own random state is left as it was.
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(batch[0].seed)
            output_ids = model.generate(
                input_ids=input_ids.to(model.device),
                attention_mask=attention_mask.to(model.device),
                **self._generation_kwargs(params, self.max_length - input_ids.shape[1]),
            )
        completion_ids = output_ids[:, input_ids.shape[1] :].tolist()  # (B, C)
        return [_completion(request, ids, params) for request, ids in zip(batch, completion_ids, strict=True)]

    def _generation_kwargs(self, params: SamplingParams, room: int) -> dict:
        do_sample = params.temperature > 0
        sampling = {"temperature": params.temperature, "top_p": params.top_p, "top_k": params.top_k, "min_p": None}
        return {
            "do_sample": do_sample,
            **(sampling if do_sample else dict.fromkeys(sampling)),  # transformers warns of what has no effect
            "repetition_penalty": params.repetition_penalty,
            "max_new_tokens": min(params.max_completion_length, room),
            "eos_token_id": list(params.end_token_ids),
            "pad_token_id": self.pad_token_id,
            "synced_gpus": False,  # `open_policy` gives all weights, so processes need not keep in step
            **params.extra,
        }


@contextmanager
def _without_defaults_of_its_own(model: PreTrainedModel) -> Iterator[None]:
    """A checkpoint may say how to generate, such as `num_beams`. A server does not heed that either."""
    base = model.get_base_model() if is_peft_model(model) else model
    own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own


def _completion(request: CompletionRequest, token_ids: list[int], params: SamplingParams) -> Completion:
    """Cut a generated row where it ended: behind its end token is only padding."""
    for position, token_id in enumerate(token_ids):
        if token_id in params.end_token_ids:
            return Completion(request.key, token_ids[: position + 1], "stop")
    return Completion(request.key, token_ids, "length")
