"""Bootstrap intervals of a ratio of sums: groups are drawn together with their weights.

Source: B. Efron, "Better bootstrap confidence intervals", JASA 82 (1987), for BCa; T. Hesterberg, "What
teachers should know about the bootstrap", American Statistician 69 (2015), for its expansion in small samples.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from scipy import stats

from weightproof.statistics.paired_sums import Array, PairedSums

# With fewer, Student's quantiles lie where no number of draws reaches.
MIN_DEGREES_OF_FREEDOM = 3.0
_CHUNK_ELEMENTS = 1 << 20


def bootstrap(sums: PairedSums, alpha: float, method: str, replicates: int) -> tuple[str, tuple[float, float]]:
    """Two-sided interval of `sums.estimate`.

    The levels are those of a bootstrap interval at the nominal `expanded_tail`, which gives it the width of
    Student's t with `degrees_of_freedom`. Drawing is seeded by the sample's ranks: the same interval in any
    order and any unit.

    Args:
        sums: The sample.
        alpha: Two-sided error.
        method: "bca" or "percentile".
        replicates: Resamples.

    Returns:
        The method used ("percentile" where BCa is not defined) and the two ends.
    """
    if sums.is_constant:
        return method, (sums.estimate, sums.estimate)
    draws = resampled(sums, replicates)
    tail = expanded_tail(alpha / 2, sums.effective_size, degrees_of_freedom(sums))
    levels = (tail, 1.0 - tail)
    if method == "bca":
        adjusted = bca_levels(sums, draws, tail)
        method, levels = ("percentile", levels) if adjusted is None else ("bca", adjusted)
    lower, upper = np.quantile(draws, levels)
    return method, (float(lower), float(upper))


def resampled(sums: PairedSums, replicates: int) -> Array:
    """(replicates,) ratios of sums of groups drawn with replacement, each with its weight."""
    generator, n = np.random.default_rng(_seed(sums)), sums.num_groups
    rows = max(1, _CHUNK_ELEMENTS // n)
    found: list[Array] = []
    for start in range(0, replicates, rows):
        drawn = generator.integers(0, n, size=(min(rows, replicates - start), n))
        found.append(sums.difference[drawn].sum(axis=1) / sums.weights[drawn].sum(axis=1))
    return np.concatenate(found)


def degrees_of_freedom(sums: PairedSums) -> float:
    """Of the variance of the estimate, after Satterthwaite: 2 (mean)^2 / variance of the variance's own estimate.

    The least of three counts: groups by their weight ((sum w)^2 / sum w^2 - 1), by the variance that weights alone
    give them ((sum w^2)^2 / sum w^4), and by the spread found, u = difference - estimate * w
    (3 (sum u^2)^2 / sum u^4, which is n for a normal sample and less for heavy tails).
    """
    shares = sums.weights / sums.weights.max()
    residual = sums.difference - sums.estimate * sums.weights
    largest = np.abs(residual).max()
    residual = residual / largest if largest > 0 else np.ones_like(residual)
    by_weight = float((shares**2).sum() ** 2 / (shares**4).sum())
    by_spread = float(3.0 * (residual**2).sum() ** 2 / (residual**4).sum())
    return min(sums.effective_size - 1.0, by_weight, by_spread)


def expanded_tail(tail: float, size: float, freedom: float) -> float:
    """The tail of a normal that lies where Student's `tail` does.

    A bootstrap of n groups is too narrow twice: its variance has n where n - 1 is unbiased, and it takes normal
    quantiles. Both are undone: Phi(-sqrt(n / (n - 1)) t), with t Student's quantile (Hesterberg). With fewer than
    two groups or degrees of freedom nothing can be undone.
    """
    if size < 2 or freedom < 1:
        return tail
    quantile = math.sqrt(size / (size - 1.0)) * float(stats.t.isf(tail, freedom))
    return float(stats.norm.sf(quantile))


def bca_levels(sums: PairedSums, draws: Array, tail: float) -> tuple[float, float] | None:
    """Levels at which the draws' quantiles are the BCa interval; None where bias or acceleration is not defined."""
    below = float(np.mean(draws < sums.estimate) + np.mean(draws <= sums.estimate)) / 2
    if sums.num_groups < 2 or not 0 < below < 1:
        return None
    left_out = (sums.difference.sum() - sums.difference) / (sums.weights.sum() - sums.weights)
    deviation = left_out.mean() - left_out
    spread = float((deviation**2).sum())
    acceleration = float((deviation**3).sum()) / (6.0 * spread**1.5) if spread > 0 else 0.0
    bias, quantile = float(stats.norm.ppf(below)), float(stats.norm.isf(tail))
    if acceleration * (bias + quantile) >= 1 or acceleration * (bias - quantile) >= 1:
        return None
    ends = (bias - quantile, bias + quantile)
    low, high = (float(stats.norm.cdf(bias + z / (1.0 - acceleration * z))) for z in ends)
    return low, high


def _seed(sums: PairedSums) -> int:
    """From the ranks of the sorted sample: they change neither with its order nor with its units."""
    ranks = [np.unique(array, return_inverse=True)[1] for array in (sums.before, sums.after, sums.weights)]
    content = b"".join(rank.astype("<i8").tobytes() for rank in ranks)
    return int.from_bytes(hashlib.sha256(content).digest(), "big")
