"""Self-Play Fine-Tuning (SPIN) on top of Hugging Face TRL.

The names below are loaded on first use, so that `python -m spin_trl.serve` and the server's supervisor start without
importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING


__version__ = "0.1.0"

_EXPORTS = {
    "SPINConfig": "spin_trl.spin_config",
    "SPINTrainer": "spin_trl.spin_trainer",
    "load_pairs": "spin_trl.run_directory.load_pairs",
    # For a sampler of your own (docs/samplers.md).
    "OpponentSampler": "spin_trl.generation.sampler",
    "Completion": "spin_trl.generation.sampler",
    "CompletionRequest": "spin_trl.generation.sampler",
    "SamplingParams": "spin_trl.generation.sampler",
    "SamplerError": "spin_trl.generation.sampler",
}

__all__ = [*_EXPORTS, "__version__"]

if TYPE_CHECKING:
    from spin_trl.generation.sampler import Completion as Completion
    from spin_trl.generation.sampler import CompletionRequest as CompletionRequest
    from spin_trl.generation.sampler import OpponentSampler as OpponentSampler
    from spin_trl.generation.sampler import SamplerError as SamplerError
    from spin_trl.generation.sampler import SamplingParams as SamplingParams
    from spin_trl.run_directory.load_pairs import load_pairs as load_pairs
    from spin_trl.spin_config import SPINConfig as SPINConfig
    from spin_trl.spin_trainer import SPINTrainer as SPINTrainer


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'spin_trl' has no attribute '{name}'")
    return getattr(import_module(_EXPORTS[name]), name)
