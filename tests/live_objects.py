"""Counts what a run keeps alive."""

import gc

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader

from spin_trl import SPINTrainer


_LARGEST_BATCH = 1000  # numbers in one of its tensors, here


def count_live_objects(trainer: SPINTrainer) -> dict[str, int]:
    """
    Tensors, the numbers in those that are larger than a batch, datasets, loaders and hooks of this whole process, and
    what accelerate keeps.
    """
    gc.collect()
    objects = gc.get_objects()

    def living(kind: type) -> list:
        return [item for item in objects if issubclass(type(item), kind)]

    tensors, modules = living(torch.Tensor), living(nn.Module)
    kept = ("_models", "_optimizers", "_schedulers", "_dataloaders")
    return {
        "tensors": len(tensors),
        "numbers": sum(tensor.numel() for tensor in tensors if tensor.numel() > _LARGEST_BATCH),
        "datasets": len(living(Dataset)),
        "loaders": len(living(DataLoader)),
        "modules": len(modules),
        "hooks": sum(len(value) for item in modules for name, value in vars(item).items() if "hooks" in name and value),
        "callbacks": len(trainer.callback_handler.callbacks),
        "kept by accelerate": sum(len(getattr(trainer.accelerator, kind)) for kind in kept),
    }
