"""What a loss is to the rest of the package: a formula and its traits, in one table. Knows no formula itself."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..config_checks import NumberRule


@dataclass(frozen=True)
class LogProbs:
    """
    Log-probs of a batch of pairs, each summed over the tokens of an answer, in nats, of shape `(B,)`.

    A log-ratio is `r(u) = log p(u|x) - log p_t(u|x)`: of an answer `u`, between the policy `p` and the reference `p_t`,
    which in self-play is the opponent. The ground truth `y` is chosen, the opponent's answer `y'` rejected.
    """

    chosen: torch.Tensor  # log p(y)
    rejected: torch.Tensor  # log p(y')
    ref_chosen: torch.Tensor  # log p_t(y)
    ref_rejected: torch.Tensor  # log p_t(y')
    initial: torch.Tensor | None = None  # log p(y0), where y0 is the initial policy's answer

    @property
    def chosen_logratios(self) -> torch.Tensor:
        """`r(y)`, of shape `(B,)`."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_logratios(self) -> torch.Tensor:
        """`r(y')`, of shape `(B,)`."""
        return self.rejected - self.ref_rejected


@dataclass(frozen=True)
class Objective:
    """
    One value of `loss_type`, `name`. The defaults of the traits suit a loss of which nothing is known.

    Its `function` is called with [`LogProbs`], `beta`, and the `fields` of the configuration that it reads besides, by
    name. It returns the losses of the pairs, of shape `(B,)`, or that of the whole batch. DPOTrainer's have none.
    """

    name: str
    function: Callable[..., torch.Tensor] | None = None
    fields: Mapping[str, NumberRule] = field(default_factory=dict)
    # Whether the reference's log-probs are in it.
    sees_reference: bool = True
    # Whether it compares with the initial policy's answers, which are then kept with the run; or the name of its field
    # that weighs them, so that at 0 none are.
    sees_initial: bool | str = False
    # Whether it is no mean over pairs. It is then given the pairs of all processes.
    is_of_batch: bool = False
    # Whether it does not change if a prompt's two reference log-probs rise alike.
    is_of_difference: bool = False
    # Whether a pair of equal sides can move the policy.
    learns_from_identical_pairs: bool = True
    # Whether the chosen sides have to be samples of the data and the rejected ones of an opponent; and of an opponent
    # that is the very reference.
    needs_data_and_opponent: bool = False
    needs_samples_of_reference: bool = False

    @property
    def is_own(self) -> bool:
        """Whether DPOTrainer lacks it."""
        return self.function is not None

    @property
    def needs_normaliser(self) -> bool:
        """Whether a constant that is added to a prompt's two reference log-probs matters to it."""
        return self.sees_reference and not self.is_of_difference


OBJECTIVES: dict[str, Objective] = {}


def register(objective: Objective) -> None:
    """Make a loss known, before a configuration names it. `ValueError` if there is one of this name."""
    if objective.name in OBJECTIVES:
        raise ValueError(
            f"A loss named '{objective.name}' is registered already. Give yours another name, and register it once."
        )
    OBJECTIVES[objective.name] = objective


def objectives_of(loss_types: Sequence[str]) -> list[Objective]:
    """The losses of these names. `ValueError` if one is unknown."""
    if unknown := [name for name in loss_types if name not in OBJECTIVES]:
        raise ValueError(
            f"`loss_type` has the unknown value(s) {unknown}. Use one or several of {sorted(OBJECTIVES)} (the loss of "
            "SPIN's paper is 'sigmoid'), or register yours first with `spin_trl.objectives.register`."
        )
    return [OBJECTIVES[name] for name in loss_types]
