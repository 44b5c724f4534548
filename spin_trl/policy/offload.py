"""`Offloader`: tensors that leave their device for a while, for host memory. Knows nothing of servers and iterations.

What the libraries have moves modules (`Module.to`, accelerate's `cpu_offload_with_hook`), but not the optimizer's state
beside them, and breaks the link between tensors that share memory.
"""

import gc
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import torch
from accelerate.utils import recursively_apply
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
        # Tensors that shared one piece of memory with their places in it, its content, and its device.
        self._away: list[tuple[list[tuple], torch.UntypedStorage, torch.device]] = []

    def offload(self) -> int:
        """Move all tensors away, unless they are. Returns the number of bytes that have been freed."""
        if self._away:
            return 0
        for tensors in _by_storage(self.find_tensors()):
            places = [(tensor, tensor.storage_offset(), tensor.size(), tensor.stride()) for tensor in tensors]
            # Not pinned: that would come in powers of two, and never be given back.
            self._away.append((places, _copy_to("cpu", tensors[0].untyped_storage()), tensors[0].device))
            for tensor in tensors:
                tensor.data = tensor.data.new_empty(0)
        gc.collect()
        clear_device_cache()
        return sum(content.nbytes() for _, content, _ in self._away)

    def reload(self) -> None:
        """Move all tensors back, where any are away."""
        while self._away:
            places, content, device = self._away[-1]
            storage = _copy_to(device, content)
            for tensor, *place in places:
                tensor.data = tensor.data.new_empty(0).set_(storage, *place)
            self._away.pop()  # its host memory is free from here on


def training_tensors(model: nn.Module, optimizer: Optimizer | None, device: torch.device) -> Iterator[torch.Tensor]:
    """What training keeps on a kind of device: weights, buffers, gradients and the optimizer's state."""
    found = [*model.parameters(), *model.buffers(), *(parameter.grad for parameter in model.parameters())]
    if optimizer is not None:
        recursively_apply(found.append, dict(optimizer.state))
    for tensor in found:
        # bitsandbytes' paged optimizers move their own pages.
        if isinstance(tensor, torch.Tensor) and tensor.device.type == device.type:
            if not getattr(tensor, "is_paged", False):
                yield tensor


def _copy_to(device: torch.device | str, storage: torch.UntypedStorage) -> torch.UntypedStorage:
    return torch.UntypedStorage(storage.nbytes(), device=device).copy_(storage)


def _by_storage(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The tensors that hold anything, each once, in groups that share memory."""
    groups: dict[int, dict[int, torch.Tensor]] = defaultdict(dict)
    for tensor in tensors:
        if tensor.untyped_storage().nbytes() > 0:
            groups[tensor.untyped_storage().data_ptr()][id(tensor)] = tensor
    return [list(group.values()) for group in groups.values()]
