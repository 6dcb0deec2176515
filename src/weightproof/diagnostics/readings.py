"""What is kept of one batch at every place of the residual stream: small, exact, and additive over batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weightproof.diagnostics.numerics import unit_rows

__all__ = ["BatchReading", "Place", "PointReading", "read_gradient", "token_norms"]


@dataclass(frozen=True, slots=True)
class Place:
    """One place of the residual stream.

    Attributes:
        name: Public name.
        trunk: Number of the list of blocks that it belongs to.
        width: Features of the stream there; None where it is not known.
    """

    name: str
    trunk: int
    width: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PointReading:
    """One batch at one place.

    Attributes:
        norms: (tokens,) norms of the residual stream at real tokens, float64.
        gradients: (tokens,) norms of the summed loss's gradient at the tokens that count; None where no gradient came.
        zeros: Entries of those gradients that are exactly zero.
        subnormals: Entries that are below the smallest normal number of their dtype.
        entries: All entries.
        unit_sum: (d,) sum of the directions of the samples' gradients.
        units: How many samples have a direction.
        without: Samples whose gradient is exactly zero.
        mean: (d,) mean of the samples' gradients.
    """

    norms: Tensor
    gradients: Tensor | None
    zeros: int = 0
    subnormals: int = 0
    entries: int = 0
    unit_sum: Tensor | None = None
    units: int = 0
    without: int = 0
    mean: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class BatchReading:
    """One batch: its places in order, its size and its loss."""

    places: tuple[Place, ...]
    points: tuple[PointReading, ...]
    rows: int
    tokens: int
    dtype: str
    loss: float
    count: int | None


def token_norms(hidden: Tensor, real: Tensor | None) -> Tensor:
    """Norms over features of real tokens: (rows, tokens, d) or (rows, d) -> (n,) float64 on the CPU."""
    with torch.no_grad():
        norms = torch.linalg.vector_norm(hidden.detach(), dim=-1, dtype=_wide(hidden))
        return (norms.flatten() if real is None else norms[real]).double().cpu()


def read_gradient(norms: Tensor, gradient: Tensor | None, real: Tensor | None, scored: Tensor | None) -> PointReading:
    """Account for the gradient (rows, [tokens,] d) at one place.

    The tokens that count are those that are scored, where that is known; else those that any gradient reaches, with
    one zero for each sample that it does not reach at all: the last layer of a classifier sees one token's gradient.

    Args:
        norms: (n,) of the residual stream, kept as they are.
        gradient: Of the summed loss; None where the graph does not reach this place.
        real: (rows, tokens) bool, None where every token is real.
        scored: The same shape, which of them are scored; None where it is not known.
    """
    if gradient is None:
        return PointReading(norms, None)
    with torch.no_grad():
        gradient = gradient.detach()
        if gradient.ndim == 2:
            gradient = gradient[:, None]
        lengths = torch.linalg.vector_norm(gradient, dim=-1, dtype=_wide(gradient))
        counted, lost = _counted(lengths, real, scored)
        values = gradient[counted]
        limit = torch.finfo(values.dtype).tiny
        zeros = values == 0
        subnormals = (values.abs() < limit) & ~zeros
        inside = gradient if real is None else torch.where(real[..., None], gradient, torch.zeros_like(gradient))
        samples = inside.sum(dim=1, dtype=_wide(gradient)).double().cpu()
        units = unit_rows(samples)
        return PointReading(
            norms=norms,
            gradients=torch.cat([lengths[counted].double().cpu(), torch.zeros(lost, dtype=torch.float64)]),
            zeros=int(zeros.sum()) + lost * gradient.shape[-1],
            subnormals=int(subnormals.sum()),
            entries=values.numel() + lost * gradient.shape[-1],
            unit_sum=units.sum(dim=0),
            units=len(units),
            without=len(samples) - len(units),
            mean=samples.mean(dim=0),
        )


def _counted(lengths: Tensor, real: Tensor | None, scored: Tensor | None) -> tuple[Tensor, int]:
    """Which tokens count (rows, tokens), and how many samples have none."""
    if scored is not None and scored.shape == lengths.shape:
        return scored.to(lengths.device), 0
    reached = lengths != 0  # NaN counts: it is not zero
    if real is not None:
        reached &= real
    return reached, int((~reached.any(dim=1)).sum())


def _wide(tensor: Tensor) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def joined(parts: Sequence[Tensor]) -> Tensor:
    """(n,) of several batches."""
    return torch.cat(list(parts)) if parts else torch.zeros(0, dtype=torch.float64)
