"""Numbers that are no numbers stop a run where they first appear, with the rows of the user's data that they come from.

Knows nothing of models and files.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..data.columns import numbers
from ..data.pair_dataset import PREFERENCE, PairDataset


ORIGIN_COLUMNS = ["source_row", "iteration"]
_BATCH_KEY = "pair_origins"
_NUM_ROWS_NAMED = 10

_REMEDY = (
    "Lower `learning_rate`, use bf16 instead of fp16, and look at these rows. Then start the same command again: it "
    "goes on from the last checkpoint."
)


class OriginCollator:
    """
    A data collator that adds to each batch where its pairs come from: `ORIGIN_COLUMNS`, an integer tensor of shape
    `(B, 2)`.

    Args:
        collator (`Callable`): Makes the batch itself.
        shown (`list[str]`, *optional*): Columns that `collator` is shown. By default all.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], shown: Sequence[str] | None = None):
        self.collator = collator
        self.shown = shown

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        shown = examples
        if self.shown is not None:
            shown = [{name: row[name] for name in self.shown if name in row} for row in examples]
        batch = self.collator(shown)
        if all(name in examples[0] for name in ORIGIN_COLUMNS):
            batch[_BATCH_KEY] = torch.tensor([[row[name] for name in ORIGIN_COLUMNS] for row in examples])
        return batch


def take_origins(batch: dict[str, Any]) -> torch.Tensor | None:
    """Take out of a batch what `OriginCollator` has added: no model knows it."""
    return batch.pop(_BATCH_KEY, None)


@dataclass
class StepNumbers:
    """
    What one forward pass of the policy gave.

    Args:
        sides (`dict[str, torch.Tensor]`): Log-probs of "chosen", "rejected" and perhaps "initial", each of shape
            `(B,)`, in nats.
        origins (`torch.Tensor` of shape `(B, 2)`, *optional*): See [`OriginCollator`].
    """

    sides: Mapping[str, torch.Tensor]
    origins: torch.Tensor | None

    def require_finite(self, loss: torch.Tensor, step: int, iteration: int | None) -> None:
        """
        Asks the device one question. The loss scaler of fp16 plays no part in it: the loss is not scaled yet.

        Args:
            loss (`torch.Tensor` without dimensions): Of this batch.

        Raises:
            `FloatingPointError`: if the loss or a log-prob is not finite.
        """
        if torch.isfinite(torch.cat([loss.reshape(-1), *self.sides.values()])).all().item():
            return
        origins = [] if self.origins is None else self.origins.tolist()
        values = {side: logps.detach().float().cpu().numpy() for side, logps in self.sides.items()}
        found = _name_sides(values, origins, iteration) or (
            f"The policy's log-probs are finite, so the loss itself overflows: lower `beta` or take another "
            f"`loss_type`. The pairs are {_name_rows(origins, iteration)}."
        )
        raise FloatingPointError(
            f"The loss of step {step}, in iteration {iteration}, is {loss.mean().item()}. The run stops before the "
            f"optimizer takes the step. {found} {_REMEDY}"
        )


def require_finite_scores(pairs: PairDataset, scores: Mapping[str, np.ndarray], iteration: int) -> None:
    """
    Args:
        pairs ([`PairDataset`]): With `ORIGIN_COLUMNS`.
        scores (`dict`): `ref_chosen_logps` and `ref_rejected_logps`, each of shape `(len(pairs),)`.

    Raises:
        `FloatingPointError`: if one of them is not finite.
    """
    if all(np.isfinite(values).all() for values in scores.values()):
        return
    origins = np.stack([numbers(pairs.answers, name) for name in ORIGIN_COLUMNS], axis=1).tolist()
    found = _name_sides({name.split("_")[1]: values for name, values in scores.items()}, origins, iteration)
    raise FloatingPointError(f"The reference cannot score the pairs of iteration {iteration}. {found} {_REMEDY}")


def require_finite_truths(dataset: Dataset, logps: torch.Tensor) -> None:
    """
    Args:
        dataset ([`~datasets.Dataset`]): With the column `source_row`.
        logps (`torch.Tensor` of shape `(len(dataset),)`): Of its ground truths.

    Raises:
        `FloatingPointError`: if one of them is not finite.
    """
    broken = np.flatnonzero(~np.isfinite(logps.numpy()))
    if len(broken):
        rows = _listed([str(row) for row in numbers(dataset, "source_row")[broken]])
        raise FloatingPointError(
            "The policy cannot score the ground truths of `eval_dataset`: their log-probs are not finite in "
            f"{len(broken)} of {len(dataset)} row(s): {rows}. {_REMEDY}"
        )


def _name_sides(sides: Mapping[str, np.ndarray], origins: Sequence[Sequence[int]], iteration: int | None) -> str:
    """
    Args:
        sides (`dict[str, np.ndarray]`): Log-probs of "chosen", "rejected", ..., of shape `(B,)`.
        origins: For each pair its `ORIGIN_COLUMNS`; empty if they are not known.

    Returns:
        `str`: which of them are not finite; empty if all are.
    """
    named = []
    for side, logps in sides.items():
        broken = np.flatnonzero(~np.isfinite(logps))
        if len(broken):
            rows = [origins[i] for i in broken] if origins else []
            named.append(f"the {side} side in {len(broken)} of {len(logps)} pair(s), {_name_rows(rows, iteration)}")
    return f"Log-probs that are not finite: {'; '.join(named)}." if named else ""


def _name_rows(origins: Sequence[Sequence[int]], iteration: int | None) -> str:
    """Which rows of the user's data, and, where history joins in, whose answers to them."""
    if not origins:
        return "of rows that are not known (the `data_collator` is not given `source_row`)"
    where = {iteration: "", PREFERENCE: " (of `preference_dataset`)"}
    names = [f"{row}{where.get(of, f' (answered in iteration {of})')}" for row, of in origins]
    return f"of these rows of `train_dataset`: {_listed(names)}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NUM_ROWS_NAMED} more" if len(names) > _NUM_ROWS_NAMED else ""
    return ", ".join(names[:_NUM_ROWS_NAMED]) + more
