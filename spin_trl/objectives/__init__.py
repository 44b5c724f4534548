"""What is minimised: the losses, their traits and references. Knows nothing of files, models and the config class.

A loss is one file in `losses/`, or one call of [`register`] in a script of yours.
"""

from . import losses as losses
from .objective import OBJECTIVES, LogProbs, Objective, register


__all__ = ["OBJECTIVES", "LogProbs", "Objective", "register"]
