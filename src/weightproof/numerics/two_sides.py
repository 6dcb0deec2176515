"""How the two sides of a contrast stand to one another, from their factors: nothing of full size is formed.

With tau+ and tau- what training towards and away from a behaviour changed, b = tau+ - tau- is the contrast that is
steered with and M = tau+ + tau- what both sides have in common, the drift.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, float64

from weightproof.subspace import Factored

Change = Tensor | Factored


@dataclass(frozen=True)
class Sides:
    """Cosines and ratios of the two sides; None where a side is zero and there is none.

    Attributes:
        cosine: Of tau+ and -tau-: 1 where the sides are each other's opposite.
        norm_ratio: ||tau+|| / ||tau-||.
        drift_ratio: ||M|| / ||b||: 0 for opposite sides, 1 for orthogonal ones of the same length.
        drift_cosine: |cos(b, M)|: above 0 where one side is longer than the other.
    """

    cosine: float | None
    norm_ratio: float | None
    drift_ratio: float | None
    drift_cosine: float | None


def inner(first: Change, second: Change) -> float:
    """The sum of the products of the entries of two matrices of one shape, float64."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return float((first.to(float64) * second.to(float64)).sum())
    if isinstance(first, Tensor):
        first, second = second, first
    assert not isinstance(first, Tensor)
    left, right = first.left.to(float64), first.right.to(float64)
    if isinstance(second, Tensor):
        return float(((left.T @ second.to(float64)) * right).sum())
    return float(((left.T @ second.left.to(float64)) * (right @ second.right.to(float64).T)).sum())


def sides(pairs: Iterable[tuple[Change | None, Change | None]]) -> Sides:
    """The two sides over all matrices: (tau+, tau-) of each; None for a matrix that a side does not change."""
    plus = minus = both = 0.0
    for positive, negative in pairs:
        plus += 0.0 if positive is None else inner(positive, positive)
        minus += 0.0 if negative is None else inner(negative, negative)
        both += 0.0 if positive is None or negative is None else inner(positive, negative)
    drift, contrast = max(0.0, plus + minus + 2 * both), max(0.0, plus + minus - 2 * both)
    return Sides(
        cosine=_ratio(-both, math.sqrt(plus * minus)),
        norm_ratio=_ratio(math.sqrt(plus), math.sqrt(minus)),
        drift_ratio=_ratio(math.sqrt(drift), math.sqrt(contrast)),
        drift_cosine=_ratio(abs(plus - minus), math.sqrt(drift * contrast)),
    )


def bisector_weights(positive: Change, negative: Change) -> tuple[float, float] | None:
    """How much of each side the bisector has: p tau+ - q tau-.

    Both sides count with length one, and the sum has the length of tau+ - tau-. None where a side is zero, or both
    point the same way.
    """
    plus, minus = math.sqrt(inner(positive, positive)), math.sqrt(inner(negative, negative))
    if plus == 0.0 or minus == 0.0:
        return None
    cosine = max(-1.0, min(1.0, inner(positive, negative) / (plus * minus)))
    unit = 2.0 - 2.0 * cosine
    if unit <= 1e-12:
        return None
    length = math.sqrt(max(0.0, plus**2 + minus**2 - 2.0 * plus * minus * cosine) / unit)
    return length / plus, length / minus


def _ratio(over: float, under: float) -> float | None:
    return over / under if under > 0.0 else None
