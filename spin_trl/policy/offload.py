"""`Offloader`: tensors that leave their device for a while, for host memory. Knows nothing of servers and iterations.

What the libraries have moves modules (`Module.to`, accelerate's `cpu_offload_with_hook`), but not the optimizer's state
beside them, and breaks the link between tensors that share memory.
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import nn
from torch.optim import Optimizer


class Offloader:
    """
    Moves tensors to host memory, and back to where they were.

    Parameters, gradients and states stay the objects that they are, so tied weights stay tied and whoever holds one of
    them, as DistributedDataParallel does, need not know. While they are away they are empty: a forward pass, or writing
    them to disk, fails instead of computing from something else.

    Args:
        find_tensors (`Callable[[], Iterable[torch.Tensor]]`): Gives the tensors to move, whenever they are to be moved.
    """

    def __init__(self, find_tensors: Callable[[], Iterable[torch.Tensor]]):
        self.find_tensors = find_tensors
        self._away: list[_Storage] = []

    def offload(self) -> int:
        """
        Move all tensors away. Nothing happens if they are.

        Returns:
            `int`: Number of bytes that have been freed.
        """
        if self._away:
            return 0
        for tensors in _by_storage(self.find_tensors()):
            self._away.append(_Storage(tensors))  # one by one: what has gone can come back if the next does not fit
        gc.collect()
        clear_device_cache()
        return sum(storage.num_bytes for storage in self._away)

    def reload(self) -> None:
        """Move all tensors back. Nothing happens if none is away."""
        while self._away:
            self._away[-1].reload()
            self._away.pop()  # its host memory is free from here on


class _Storage:
    """Tensors that share one piece of memory, and its content in host memory."""

    def __init__(self, tensors: list[torch.Tensor]):
        shared = tensors[0].untyped_storage()
        self.num_bytes = shared.nbytes()
        self._device = tensors[0].device
        self._places = [(tensor, tensor.storage_offset(), tensor.size(), tensor.stride()) for tensor in tensors]
        # Not pinned: that would come in powers of two, and never be given back.
        self._content = _bytes_in(shared).to("cpu", copy=True)
        for tensor in tensors:
            tensor.data = tensor.data.new_empty(0)

    def reload(self) -> None:
        content = self._content.to(self._device, copy=True).untyped_storage()
        for tensor, offset, size, stride in self._places:
            tensor.data = tensor.data.new_empty(0).set_(content, offset, size, stride)


def _bytes_in(storage: torch.UntypedStorage) -> torch.Tensor:
    """All bytes of a piece of memory, without a copy."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _by_storage(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The tensors that hold anything, each once, in groups that share memory."""
    groups: dict[int, dict[int, torch.Tensor]] = {}
    for tensor in tensors:
        if tensor.untyped_storage().nbytes() > 0:
            groups.setdefault(tensor.untyped_storage().data_ptr(), {})[id(tensor)] = tensor
    return [list(group.values()) for group in groups.values()]


def training_tensors(model: nn.Module, optimizer: Optimizer | None, device: torch.device) -> Iterator[torch.Tensor]:
    """What training keeps on a kind of device: weights, buffers, gradients and the optimizer's state."""
    found = [*model.parameters(), *model.buffers()]
    found += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    found += _tensors_in(dict(optimizer.state)) if optimizer is not None else []
    for tensor in found:
        # bitsandbytes' paged optimizers move their own pages.
        if tensor.device.type == device.type and not getattr(tensor, "is_paged", False):
            yield tensor


def _tensors_in(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else []
    return [tensor for value in values for tensor in _tensors_in(value)]
