"""Many matrices are tested at once: control of the false discovery rate, and p-values of a null."""

from __future__ import annotations

import math
from collections.abc import Sequence


def benjamini_hochberg(p_values: Sequence[float], alpha: float) -> tuple[bool, ...]:
    """Which hypotheses the Benjamini-Hochberg step-up rule rejects.

    With p sorted ascending, k is the largest rank with p_(k) <= alpha k / m, and all p <= p_(k) are
    rejected; m counts every hypothesis *tested*, never only those that look suspicious
    (Benjamini and Hochberg, J. R. Stat. Soc. B 57, 1995). A NaN p-value is never rejected but
    counts in m; an alpha outside (0, 1] rejects nothing.
    """
    if not 0.0 < alpha <= 1.0:
        return (False,) * len(p_values)
    ordered = sorted(p for p in p_values if not math.isnan(p))
    cut = max((p for rank, p in enumerate(ordered, 1) if p <= alpha * rank / len(p_values)), default=-1.0)
    return tuple(p <= cut for p in p_values)


def bonferroni(p_values: Sequence[float], alpha: float) -> tuple[bool, ...]:
    """Which hypotheses are rejected at alpha / m each (family-wise error rate <= alpha)."""
    if not 0.0 < alpha <= 1.0:
        return (False,) * len(p_values)
    return tuple(p <= alpha / len(p_values) for p in p_values)


def exponential_tail_p(deviation: float, scale: float) -> float:
    """P(|X| >= deviation) = exp(-deviation / scale) of a fitted exponential tail.

    Unlike an empirical null of n draws, whose smallest p is 1 / (n + 1), it can reach any alpha / m;
    what it says beyond the range of its n draws is an assumption, so policies mark it provisional.
    """
    if math.isnan(deviation):
        return math.nan
    return math.exp(-max(deviation, 0.0) / scale)
