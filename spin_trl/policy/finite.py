"""Numbers that are no numbers stop a run where they first appear, with the rows of the user's data that they come from.

Knows nothing of models and files.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..data.columns import numbers
from ..data.pair_dataset import PREFERENCE, PairDataset


_ORIGIN_COLUMNS = ["source_row", "iteration"]
_BATCH_KEY = "pair_origins"
_NUM_ROWS_NAMED = 10
_REMEDY = (
    "Lower `learning_rate`, use bf16 instead of fp16, and look at these rows. Then start the same command again: it "
    "goes on from the last checkpoint."
)


def collate_with_origins(
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]], examples: list[dict[str, Any]]
) -> dict[str, Any]:
    """The batch that a data collator makes, and where its pairs come from."""
    batch = collator(examples)
    if _ORIGIN_COLUMNS[0] in examples[0]:
        batch[_BATCH_KEY] = torch.tensor([[row[name] for name in _ORIGIN_COLUMNS] for row in examples])
    return batch


def take_origins(batch: dict[str, Any]) -> torch.Tensor | None:
    """Take out of a batch where its pairs come from, of shape `(B, 2)`: no model knows it."""
    return batch.pop(_BATCH_KEY, None)


def require_finite_loss(
    loss: torch.Tensor,
    sides: Mapping[str, torch.Tensor],
    origins: torch.Tensor | None,
    step: int,
    iteration: int | None,
) -> None:
    """
    Raises `FloatingPointError` if the loss of a batch, which fp16 has not scaled yet, or a log-prob is not finite.
    Asks the device one question.

    Args:
        sides (`dict[str, torch.Tensor]`): The policy's log-probs of "chosen", "rejected" and perhaps "initial", each of
            shape `(B,)`, in nats.
        origins (`torch.Tensor` of shape `(B, 2)`, *optional*): See [`take_origins`].
    """
    if torch.isfinite(torch.cat([loss.reshape(-1), *sides.values()])).all().item():
        return
    rows = None if origins is None else _row_names(*origins.T.tolist(), iteration)
    stop = (
        f"The loss of step {step}, in iteration {iteration}, is {loss.mean().item()}. The run stops before the "
        "optimizer takes the step."
    )
    require_finite(stop, {side: logps.detach().float().cpu().numpy() for side, logps in sides.items()}, rows)
    raise FloatingPointError(
        f"{stop} The policy's log-probs are finite, so the loss itself overflows: lower `beta` or take another "
        f"`loss_type`. The pairs are of {_listed(rows, range(len(sides['chosen'])))}. {_REMEDY}"
    )


def require_finite_scores(pairs: PairDataset, scores: Mapping[str, np.ndarray], iteration: int) -> None:
    """As [`require_finite`], for `ref_chosen_logps` and `ref_rejected_logps` of an iteration's pairs."""
    rows = _row_names(*(numbers(pairs.answers, name) for name in _ORIGIN_COLUMNS), iteration)
    sides = {name.split("_")[1]: logps for name, logps in scores.items()}
    require_finite(f"The reference cannot score the pairs of iteration {iteration}.", sides, rows)


def require_finite(
    what: str, sides: Mapping[str, np.ndarray], rows: Callable[[int], Any] | None, dataset: str = "train_dataset"
) -> None:
    """
    Raises `FloatingPointError`, which begins with the sentence `what`, if a log-prob is not finite.

    Args:
        sides (`dict[str, np.ndarray]`): Log-probs of "chosen", "rejected", ..., each of shape `(B,)`.
        rows (`Callable[[int], Any]`, *optional*): Gives, for each of the B, the row of the user's `dataset`.
    """
    found = [
        f"the {side} side in {len(where)} of {len(logps)}, of {_listed(rows, where, dataset)}"
        for side, logps in sides.items()
        if len(where := np.flatnonzero(~np.isfinite(logps)))
    ]
    if found:
        raise FloatingPointError(f"{what} Log-probs that are not finite: {'; '.join(found)}. {_REMEDY}")


def _row_names(source_rows: Sequence[int], iterations: Sequence[int], iteration: int | None) -> Callable[[int], str]:
    """Rows of the user's data, and, where history joins in, whose answers to them."""
    where = {iteration: "", PREFERENCE: " (of `preference_dataset`)"}
    return lambda i: f"{source_rows[i]}{where.get(iterations[i], f' (answered in iteration {iterations[i]})')}"


def _listed(rows: Callable[[int], Any] | None, where: Sequence[int], dataset: str = "train_dataset") -> str:
    if rows is None:
        return "rows that are not known"
    more = f" and {len(where) - _NUM_ROWS_NAMED} more" if len(where) > _NUM_ROWS_NAMED else ""
    return f"these rows of `{dataset}`: {', '.join(str(rows(i)) for i in where[:_NUM_ROWS_NAMED])}{more}"
