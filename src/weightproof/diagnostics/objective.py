"""The loss whose gradient is read: summed over tokens, however it was given.

The gradient of a mean over N tokens is 1/N of that of the sum, so a floor for it would depend on the size of the
batch. Every gradient here is that of the summed loss; a loss whose reduction nobody states is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from weightproof.activations import forward_outputs
from weightproof.curvature.objectives import Objective, prepared, sample
from weightproof.errors import InputError
from weightproof.loss_data.items import task_of
from weightproof.numerics.matrices import seeded_generator
from weightproof.rng import fix_rng

__all__ = ["REDUCTIONS", "LossFn", "LossOf", "Read", "loss_of", "summed"]

Batch = Mapping[str, Tensor]
LossFn = Callable[[nn.Module, Batch], Any]
REDUCTIONS = ("sum", "mean", "none")

_UNKNOWN = (
    "the loss is a single number and nothing says how it was reduced: pass reduction='sum', or reduction='mean' and "
    "return (loss, count), or return one loss a sample"
)


@dataclass(frozen=True, slots=True)
class Read:
    """The loss of one batch.

    Attributes:
        total: The sum, in the graph.
        count: How many tokens or samples it is a sum over; None where nobody says.
        rows: (rows,) sums of losses by sample, in the graph or not; None where only the total is known.
        row_counts: (rows,) scored tokens, with `rows`.
        scored: (rows, positions) bool, which tokens are scored; None where it is not known.
        batch: The inputs that the model was given.
    """

    total: Tensor
    count: int | None
    rows: Tensor | None
    row_counts: Tensor | None
    scored: Tensor | None
    batch: Batch


LossOf = Callable[[nn.Module, Batch, int], Read]


def loss_of(model: nn.Module, loss: LossFn | None, reduction: str | None, labels: str, seed: int) -> LossOf:
    """How the loss of a batch is read.

    Args:
        model: The model; its class says what its own loss is.
        loss: The user's, called with the model and a batch; None for the model's own.
        reduction: How that one is reduced.
        labels: "given", or "sampled" from the model's distribution (only for the model's own loss).
        seed: Of sampled labels.

    Raises:
        InputError: If no loss is known for the model, or `reduction` is.
    """
    if reduction is not None and reduction not in REDUCTIONS:
        raise InputError(f"reduction must be one of {', '.join(REDUCTIONS)}, not {reduction!r}")
    if loss is not None:
        return lambda model, batch, _: _of_user(model, batch, loss, reduction)
    task, reason = task_of(model)
    if task is None:
        raise InputError(f"{reason.removesuffix(': give a metric')}: give loss= (and how it is reduced, reduction=)")
    objective = Objective(task, "sampled" if labels == "sampled" else "empirical", seed)
    return lambda model, batch, number: _of_model(model, batch, objective, number)


def summed(loss: Any, reduction: str | None) -> tuple[Tensor, int | None, Tensor | None]:
    """The sum of a loss that somebody else computed, what it is a sum over, and its rows where they are known.

    Args:
        loss: One number, one number a sample, or (number, count).
        reduction: "sum", "mean" (needs the count), "none", or None where the user did not say.

    Raises:
        InputError: If the sum cannot be told from what is given.
    """
    count = None
    if isinstance(loss, tuple) and len(loss) == 2:
        loss, count = loss[0], int(loss[1])
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        raise InputError(f"the loss is a {type(loss).__name__}, not a floating point tensor: return what was computed")
    if loss.ndim > 0 and loss.numel() > 1 and reduction in (None, "none"):
        return loss.sum(), loss.numel() if count is None else count, loss if loss.ndim == 1 else None
    if loss.numel() != 1:
        raise InputError(f"the loss has shape {tuple(loss.shape)}, but reduction={reduction!r} gives one number")
    if reduction is None:
        raise InputError(_UNKNOWN)
    if reduction == "mean":
        if count is None:
            raise InputError("the loss is a mean and nothing says over how many: return (loss, count)")
        return loss.reshape(()) * count, count, None
    return loss.reshape(()), count, None


def _of_user(model: nn.Module, batch: Batch, loss: LossFn, reduction: str | None) -> Read:
    fix_rng()
    total, count, rows = summed(loss(model, batch), reduction)
    return Read(total, count, rows, None if rows is None else torch.ones_like(rows), None, batch)


def _of_model(model: nn.Module, batch: Batch, objective: Objective, number: int) -> Read:
    """The negative log-likelihood that the model is trained with, token by token."""
    batch = prepared(batch, model, objective.task)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = forward_outputs(model, inputs).scores
    batch = {name: value.to(logits.device) for name, value in batch.items()}
    scored = objective.scored(batch).to(logits.device)
    if objective.task == "causal":
        chosen, logits = scored[:, :-1], logits[:, :-1]
    else:
        chosen = scored
    if chosen.shape != logits.shape[: chosen.ndim]:
        raise InputError(f"the labels are {tuple(scored.shape)} beside outputs {tuple(logits.shape)}: give one a token")
    picked = logits[chosen]
    picked = picked if picked.dtype == torch.float64 else picked.float()
    losses = cross_entropy(picked, _labels(picked, batch, objective, chosen, number), reduction="none")
    row = chosen.nonzero()[:, 0]
    zeros = losses.new_zeros(len(scored))
    counts = zeros.index_add(0, row, torch.ones_like(losses))
    rows = zeros.index_add(0, row, losses)
    return Read(losses.sum(), len(losses), rows, counts, scored if scored.ndim == 2 else None, batch)


def _labels(picked: Tensor, batch: Batch, objective: Objective, chosen: Tensor, number: int) -> Tensor:
    if objective.labels == "sampled":
        return sample(picked.detach(), seeded_generator("health labels", objective.seed, number)).to(picked.device)
    labels = batch.get("labels")
    if objective.task == "causal":
        labels = batch["input_ids"] if labels is None else labels
        return labels[:, 1:][chosen]
    if labels is None:
        raise InputError("the batches have no labels: add them (for text alone, a masked model needs them too)")
    return labels.reshape(-1).long() if objective.task == "classes" else labels[chosen].long()
