"""`ServerRest`: a managed server that gives its memory back while nobody asks it anything.

On a GPU it sleeps: vLLM frees the weights and the cache, and keeps its process and what it has compiled. Where vLLM
cannot (a CPU), it is ended, and started again for its next turn. Knows nothing of opponents and of the policy.
"""

import logging

from ..sampler import SamplerError
from .http_api import VLLMServer
from .managed_server import ManagedServer


logger = logging.getLogger(__name__)

_WEIGHTS_IN_HOST_MEMORY, _WEIGHTS_DISCARDED = 1, 2  # vLLM's levels of sleep; both discard the cache and forget prefixes


class ServerRest:
    """
    When a managed server rests, and that it is fit when it wakes. On the main process only.

    A server that rests is not watched: if it ends meanwhile, it is started again when it is to wake, not before, since
    its memory is in use elsewhere.

    Args:
        process ([`ManagedServer`]): The server. It is running.
        client ([`VLLMServer`]): A connection to it.
        needs_base_weights (`bool`): Whether what is published next lacks the base model's weights, as adapters do.
    """

    def __init__(self, process: ManagedServer, client: VLLMServer, needs_base_weights: bool):
        self.process = process
        self.client = client
        self.needs_base_weights = needs_base_weights
        self._is_resting = False

    def __str__(self) -> str:
        """How it rests, and why so."""
        if not self.process.can_sleep:
            return "is ended, and started again for its next turn: vLLM's CPU build cannot sleep"
        if self.needs_base_weights:
            return "sleeps at level 1: the base model's weights wait in host memory"
        return "sleeps at level 2: its weights are discarded, since the next opponent brings its own"

    def nap(self) -> None:
        """Free the memory for a moment, and lose nothing but time. A server that cannot sleep stays awake."""
        if self.process.can_sleep and not self._is_resting:
            self._fall_asleep(_WEIGHTS_IN_HOST_MEMORY)
            self._is_resting = True

    def sleep(self) -> None:
        """Free the memory until another opponent is published."""
        if self._is_resting:
            return
        if not self.process.can_sleep:
            self.process.suspend()
        elif self.needs_base_weights:
            self._fall_asleep(_WEIGHTS_IN_HOST_MEMORY)
        else:
            self._fall_asleep(_WEIGHTS_DISCARDED)
        self._is_resting = True

    def wake(self) -> None:
        """
        Have the server answer again.

        Raises:
            `SamplerError`: if it can be neither woken nor started.
        """
        if not self._is_resting:
            return
        self.process.resume()
        if self.process.can_sleep:
            try:
                self.client.wake_up()
            except SamplerError as error:
                self._require_alive(error)
                logger.warning(f"The vLLM server did not wake up, so it is started again: {error}")
                self.process.suspend()
                self.process.resume()
        self._is_resting = False

    def _fall_asleep(self, level: int) -> None:
        self.process.unwatch()
        try:
            if level == _WEIGHTS_DISCARDED:
                self._remove_marks()
            self.client.sleep(level)
        except SamplerError as error:
            self._require_alive(error)
            logger.warning(f"The vLLM server did not fall asleep, so it is ended until its next turn: {error}")
            self.process.suspend()

    def _remove_marks(self) -> None:
        """The marks say that the workers hold an opponent's weights, which is about to be untrue."""
        for mark in self.client.marks():
            self.client.remove_mark(mark)

    def _require_alive(self, error: SamplerError) -> None:
        if self.process.death_notice.exists():  # it ended too often before it was to rest
            raise error
