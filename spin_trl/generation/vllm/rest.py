"""`ServerRest`: a managed server that gives its memory back while nobody asks it anything.

On a GPU it sleeps: vLLM frees the weights and the cache, and keeps its process and what it has compiled. Where vLLM
cannot (a CPU), it is ended, and started again for its next turn. Knows nothing of opponents and of the policy.
"""

import logging
from dataclasses import dataclass

from ..sampler import SamplerError
from .managed_server import ManagedServer
from .sampler import VLLMSampler


logger = logging.getLogger(__name__)

_WEIGHTS_IN_HOST_MEMORY, _WEIGHTS_DISCARDED = 1, 2  # vLLM's levels of sleep; both discard the cache and forget prefixes


@dataclass
class ServerRest:
    """
    When a managed server rests, and that it is fit when it wakes. On the main process only.

    A server that rests is not watched: if it ends meanwhile, it is started again when it is to wake, not before, since
    its memory is in use elsewhere.

    Both the server and the sampler that is connected to it are running.
    """

    process: ManagedServer
    sampler: VLLMSampler

    _is_resting = False

    def __str__(self) -> str:
        """How it rests, and why so."""
        if not self.process.can_sleep:
            return "is ended, and started again for its next turn: vLLM's CPU build cannot sleep"
        if self.sampler.lora_rank is not None:
            return "sleeps at level 1: the base model's weights wait in host memory"
        return "sleeps at level 2: its weights are discarded, since the next opponent brings its own"

    def nap(self) -> None:
        """Free the memory for a moment, and lose nothing but time. A server that cannot sleep stays awake."""
        if self.process.can_sleep:
            self._fall_asleep(_WEIGHTS_IN_HOST_MEMORY)

    def sleep(self) -> None:
        """Free the memory until another opponent is published."""
        if self.process.can_sleep:  # adapters lack the base model's weights; full opponents bring theirs
            self._fall_asleep(_WEIGHTS_DISCARDED if self.sampler.lora_rank is None else _WEIGHTS_IN_HOST_MEMORY)
        else:
            self.process.suspend()
            self._is_resting = True

    def wake(self) -> None:
        """Have the server answer again, or raise [`SamplerError`] if it can be neither woken nor started."""
        if not self._is_resting:
            return
        self.process.resume()
        if self.process.can_sleep:
            try:
                self.sampler.wake_up()
            except SamplerError as error:
                logger.warning(f"The vLLM server did not wake up, so it is started again: {error}")
                self.process.suspend()
                self.process.resume()
        self._is_resting = False

    def _fall_asleep(self, level: int) -> None:
        if self._is_resting:
            return
        self.process.unwatch()
        try:
            self.sampler.sleep(level)
        except SamplerError as error:
            if self.process.has_ended:  # too often, before it was to rest
                raise
            logger.warning(f"The vLLM server did not fall asleep, so it is ended until its next turn: {error}")
            self.process.suspend()
        self._is_resting = True
