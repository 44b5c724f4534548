"""The methods that are compared, and which settings of each are tried. Knows nothing of tasks but learning rates."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


Setting = dict[str, float]  # fields of the configuration


@dataclass(frozen=True)
class Method:
    """
    Args:
        name (`str`): As on the command line and in file names.
        title (`str`): For the report.
        arguments (`dict[str, Any]`): Fields of [`SPINConfig`] that make it this method.
        searched (`str`, *optional*): The field that is searched besides the learning rate: `beta`, or what plays its
            part. If `None`, learning rates alone are searched, as many as others have settings.
        values (`tuple[float, ...]`): Two, of that field.
        is_self_play (`bool`): Whether `SPINTrainer` trains it. Else it is further SFT.
    """

    name: str
    title: str
    arguments: dict[str, Any] = field(default_factory=dict)
    searched: str | None = None
    values: tuple[float, ...] = ()
    is_self_play: bool = True

    def settings(self, learning_rates: Sequence[float]) -> list[Setting]:
        """
        As many for every method.

        Args:
            learning_rates (`Sequence[float]`): Six, ascending. Where two values of another field are searched too,
                every other one is tried.
        """
        if self.searched is None:
            return [{"learning_rate": rate} for rate in learning_rates]
        rates = learning_rates[:: len(self.values)]
        return [{"learning_rate": rate, self.searched: value} for rate in rates for value in self.values]


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("sft", "further SFT", is_self_play=False),
        Method("spin", "SPIN", {"loss_type": ["sigmoid"]}, "beta", (0.1, 1.0)),
        Method(
            "spin_sft",
            "SPIN + SFT",
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]},
            "beta",
            (0.1, 1.0),
        ),
        Method("space", "SPACE", {"loss_type": ["space"]}, "space_mu", (0.5, 1.0)),
        Method("t_spin", "T-SPIN", {"loss_type": ["t_spin"]}, "t_spin_alpha", (0.1, 1.0)),
        Method(
            "alpha_spin",
            "alpha-SPIN",
            {"loss_type": ["sigmoid"], "reference_mixture_alpha": 0.5},
            "beta",
            (0.1, 1.0),
        ),
    )
}
