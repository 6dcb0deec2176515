"""The formulas of training health, on plain numbers and arrays: growth, agreement of gradients, its interval.

Everything is computed in float64 and nothing is clamped: `torch.nn.functional.cosine_similarity` bounds each norm
from below by 1e-8, which reads a true cosine of 1 as .15 where gradients are 1.5e-9 long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from weightproof.errors import InputError

__all__ = [
    "batch_stability",
    "block_growth",
    "jackknife",
    "pairwise_cosine",
    "per_sample_limit",
    "stability",
    "total_growth",
    "unit_rows",
]


def block_growth(norms: Sequence[float] | Tensor) -> list[float]:
    """Ratio of each residual norm to the one before it: n_{l+1} / n_l, one number a block.

    Args:
        norms: (L + 1,) norms of the residual stream: what enters block 0, then what leaves each block.

    Returns:
        L ratios. NaN where a norm is not a number, or nothing grows from zero (0 / 0); inf from zero to something.

    Raises:
        InputError: If there are fewer than two norms, or one is negative.

    Example:
        >>> block_growth([1, 2, 60, 66])
        [2.0, 30.0, 1.1]
        >>> block_growth([1, 2, 120])
        [2.0, 60.0]
    """
    values = _norms(norms)
    return [_ratio(values[i + 1], values[i]) for i in range(len(values) - 1)]


def total_growth(norms: Sequence[float] | Tensor) -> float:
    """Norm of what leaves the last block over the norm of what enters the first: n_L / n_0.

    Ten blocks that grow 30-fold each pass any limit a block and multiply to 6e14.

    Raises:
        InputError: As `block_growth`.

    Example:
        >>> total_growth([1, 2, 60, 66])
        66.0
    """
    values = _norms(norms)
    return _ratio(values[-1], values[0])


def stability(directions: Tensor | Sequence[Sequence[float]]) -> float:
    """Mean pairwise cosine of gradient directions: (||sum of v||^2 - B) / (B (B - 1)) for unit vectors v.

    Directions need not have length 1; those of length 0 point nowhere and are left out.

    Args:
        directions: (B, d), one gradient a row.

    Returns:
        In [-1 / (B - 1), 1]; NaN where a direction is not finite.

    Raises:
        InputError: If fewer than two directions are left, or the array has not two dimensions.

    Example:
        >>> round(stability([[1, 0], [0.6, 0.8], [0.8, -0.6]]), 5)    # cosines .6, .8 and 0
        0.46667
    """
    rows = torch.as_tensor(directions).to(torch.float64)
    if rows.ndim != 2:
        raise InputError(f"directions must be (number, dimension), not of shape {tuple(rows.shape)}")
    units = unit_rows(rows)
    found = pairwise_cosine(units.sum(dim=0), len(units))
    if found is None:
        raise InputError(f"{len(units)} of {len(rows)} directions are not zero: two or more are needed to be compared")
    return found


def unit_rows(rows: Tensor) -> Tensor:
    """(n, d) -> (<= n, d) float64 rows of length 1, without those of length 0; NaN rows stay NaN.

    Each row is first divided by its largest entry, so that neither tiny nor huge gradients leave float64's range.
    """
    rows = rows.detach().to(torch.float64)
    if rows.numel() == 0:
        return rows[:0]
    largest = rows.abs().amax(dim=1, keepdim=True)
    kept = (largest != 0).flatten()
    scaled = rows[kept] / largest[kept]
    return scaled / torch.linalg.vector_norm(scaled, dim=1, keepdim=True)


def pairwise_cosine(total: Tensor, count: int) -> float | None:
    """Mean cosine of all pairs of `count` unit vectors from their sum alone; None for fewer than two."""
    if count < 2:
        return None
    return (float(total.dot(total)) - count) / (count * (count - 1))


def batch_stability(cosine: float, rows: int) -> float | None:
    """Mean cosine of means over `rows` samples, from the mean cosine of samples: s_N = N c / (1 + (N - 1) c).

    It shows why one ceiling cannot serve all batch sizes: c = .0033 is s = .03 at N = 8 and .63 at N = 512. None where
    the samples oppose each other so much that the mean has no expected length (1 + (N - 1) c <= 0).

    Example:
        >>> [round(batch_stability(0.0033, n), 2) for n in (8, 32, 128, 512)]
        [0.03, 0.1, 0.3, 0.63]
    """
    below = 1.0 + (rows - 1) * cosine
    return rows * cosine / below if below > 0 else (math.nan if math.isnan(cosine) else None)


def per_sample_limit(limit: float, rows: int) -> float:
    """The mean cosine of samples at which means over `rows` samples reach `limit`: the inverse of `batch_stability`.

    Example:
        >>> round(per_sample_limit(0.30, 128), 4)
        0.0033
    """
    return limit / (rows - (rows - 1) * limit)


def jackknife(left_out: Sequence[float], estimate: float) -> tuple[float, float] | None:
    """95 % interval of an estimate from its values with each batch left out once; None for fewer than three.

    Normal theory with Student's quantile, B - 1 degrees of freedom: sqrt((B - 1) / B * sum (x_i - mean)^2).
    Source: B. Efron and C. Stein, "The jackknife estimate of variance", Annals of Statistics 9 (1981).
    """
    count = len(left_out)
    if count < 3 or not all(map(math.isfinite, (*left_out, estimate))):
        return None
    from scipy import stats

    mean = sum(left_out) / count
    error = math.sqrt((count - 1) / count * sum((one - mean) ** 2 for one in left_out))
    half = float(stats.t.ppf(0.975, count - 1)) * error
    return estimate - half, estimate + half


def _norms(norms: Sequence[float] | Tensor) -> list[float]:
    values = [float(one) for one in norms]
    if len(values) < 2:
        raise InputError(f"growth needs two norms or more (what enters the first block too), not {len(values)}")
    if any(one < 0 for one in values):
        raise InputError(f"norms cannot be negative: {min(values):g}")
    return values


def _ratio(after: float, before: float) -> float:
    if before == 0:
        return math.nan if after == 0 or math.isnan(after) else math.inf
    return after / before
