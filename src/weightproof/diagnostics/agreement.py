"""How much the gradients of samples, and of batches, point the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from weightproof.diagnostics.numerics import jackknife, pairwise_cosine, unit_rows
from weightproof.diagnostics.readings import BatchReading, PointReading
from weightproof.diagnostics.report import Layers

__all__ = ["Agreement", "agreement_of"]


@dataclass(frozen=True, slots=True)
class Agreement:
    """At every place of the residual stream; None where fewer than two gradients are there.

    Attributes:
        per_sample: Mean cosine of the gradients of two samples.
        intervals: 95 %, by leaving out each batch in turn.
        cross_batch: Mean cosine of the mean gradients of two batches, of the size they have.
        batches: How many batches.
    """

    per_sample: Layers
    intervals: tuple[tuple[float, float] | None, ...]
    cross_batch: Layers
    batches: int


def agreement_of(batches: Sequence[BatchReading]) -> Agreement | str:
    """The agreement over some batches, or why there is none."""
    columns = list(zip(*(batch.points for batch in batches), strict=True))
    if not any(point.unit_sum is not None for column in columns for point in column):
        return "no gradient reaches any block"
    per_sample = [_per_sample(column) for column in columns]
    return Agreement(
        per_sample=tuple(per_sample),
        intervals=tuple(_interval(column, one) for column, one in zip(columns, per_sample, strict=True)),
        cross_batch=tuple(_cross_batch(column) for column in columns),
        batches=len(batches),
    )


def _per_sample(points: Sequence[PointReading]) -> float | None:
    sums = [point.unit_sum for point in points if point.unit_sum is not None]
    return pairwise_cosine(torch.stack(sums).sum(dim=0), sum(point.units for point in points)) if sums else None


def _interval(points: Sequence[PointReading], estimate: float | None) -> tuple[float, float] | None:
    if estimate is None:
        return None
    left_out = [_per_sample([*points[:number], *points[number + 1 :]]) for number in range(len(points))]
    known = [one for one in left_out if one is not None]
    return jackknife(known, estimate) if len(known) == len(left_out) else None


def _cross_batch(points: Sequence[PointReading]) -> float | None:
    means = [point.mean for point in points if point.mean is not None]
    if not means:
        return None
    units = unit_rows(torch.stack(means))
    return pairwise_cosine(units.sum(dim=0), len(units))
