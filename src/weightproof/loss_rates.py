"""Rates of the same examples before and after a change: Newcombe's interval for paired proportions.

R. G. Newcombe, "Improved confidence intervals for the difference between binomial proportions based on paired
data", Statistics in Medicine 17 (1998), method 10: Wilson's intervals of both rates, joined through their correlation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from weightproof.errors import InputError
from weightproof.paired import Interval


@dataclass(slots=True)
class PairedCounts:
    """How many examples were right (score 1) before and after, before alone, after alone, never."""

    both: int = 0
    lost: int = 0
    gained: int = 0
    neither: int = 0

    def add(self, before: np.ndarray, after: np.ndarray) -> bool:
        """Count some examples; False, and nothing counted, where a score is neither 0 nor 1."""
        if not bool(np.isin(np.stack([before, after]), (0.0, 1.0)).all()):
            return False
        right, still = before == 1.0, after == 1.0
        self.both += int((right & still).sum())
        self.lost += int((right & ~still).sum())
        self.gained += int((~right & still).sum())
        self.neither += int((~right & ~still).sum())
        return True

    @property
    def total(self) -> int:
        """All examples."""
        return self.both + self.lost + self.gained + self.neither

    def as_sums(self) -> Mapping[str, float]:
        """The four counts by name, and McNemar's exact two-sided p-value of no change."""
        discordant = self.lost + self.gained
        p = stats.binomtest(self.lost, discordant).pvalue if discordant else 1.0
        counts = {"both": self.both, "lost": self.lost, "gained": self.gained, "neither": self.neither}
        return {**{name: float(count) for name, count in counts.items()}, "mcnemar_p": float(p)}


def newcombe(counts: PairedCounts, *, alpha: float, min_effective_size: float) -> Interval:
    """Interval of (rate after - rate before).

    Args:
        counts: Of at least one example.
        alpha: Two-sided error.
        min_effective_size: With fewer examples the interval says that it must not decide.

    Raises:
        InputError: If nothing was counted.

    Example:
        >>> found = newcombe(PairedCounts(both=90, lost=0, gained=0, neither=10), alpha=0.05, min_effective_size=12)
        >>> found.estimate, found.lower < 0.0 < found.upper
        (0.0, True)
    """
    n = counts.total
    if not n:
        raise InputError("no example was counted: there is no rate")
    before, after = (counts.both + counts.lost) / n, (counts.both + counts.gained) / n
    difference = after - before
    (low1, high1), (low2, high2) = _wilson(before, n, alpha), _wilson(after, n, alpha)
    phi = _correlation(counts)
    below = _root((after - low2) ** 2 - 2 * phi * (after - low2) * (high1 - before) + (high1 - before) ** 2)
    above = _root((high2 - after) ** 2 - 2 * phi * (high2 - after) * (before - low1) + (before - low1) ** 2)
    return Interval(
        estimate=difference,
        lower=max(-1.0, difference - below),
        upper=min(1.0, difference + above),
        confidence=1.0 - alpha,
        effective_size=float(n),
        num_groups=n,
        method="newcombe",
        undecided=None
        if n >= min_effective_size
        else f"effective sample too small: {n} of at least {min_effective_size:g}",
    )


def _wilson(rate: float, n: int, alpha: float) -> tuple[float, float]:
    found = stats.binomtest(round(rate * n), n).proportion_ci(1.0 - alpha, method="wilson")
    return float(found.low), float(found.high)


def _correlation(counts: PairedCounts) -> float:
    """Newcombe's phi, with his continuity correction where it is positive; 0 where a margin is empty."""
    a, b, c, d, n = counts.both, counts.lost, counts.gained, counts.neither, counts.total
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    if not margins:
        return 0.0
    top = a * d - b * c
    top = max(top - n / 2, 0.0) if top > 0 else float(top)
    return top / math.sqrt(margins)


def _root(square: float) -> float:
    return math.sqrt(max(0.0, square))
