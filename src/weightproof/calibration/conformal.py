"""How many draws, and which of their largest scores, make limits that hold for draws to come.

Wilks' tolerance bound: of n independent draws of one distribution, whatever it is, the share that lies beyond the k-th
largest is a Beta(k, n - k + 1) variable (at most one, where values repeat). So it is at most p with confidence 1 - b as
soon as P(Binomial(n, p) <= k - 1) <= b; for the largest (k = 1) as soon as (1 - p)^n <= b.

Several limits at once, without one of them loosening the others: Tukey's statistically equivalent blocks. The first
limit is the k_1-th largest of its scores; the draws down to it are set aside; the second is the k_2-th largest of its
own scores of the rest, and so on. The share of draws to come that breaks any of them is then a Beta(k, n - k + 1)
variable with k = k_1 + k_2 + ...: one bound for all limits together.

Where scores depend on shapes, other draws fixed them: split conformal prediction.

References: S. S. Wilks, "Determination of sample sizes for setting tolerance limits", Ann. Math. Statist. 12 (1941);
A. Wald, "An extension of Wilks' method for setting tolerance limits", 14 (1943); J. W. Tukey, "Nonparametric
estimation II: statistically equivalent blocks and tolerance regions", 18 (1947), for discontinuous distributions III,
19 (1948); V. Vovk, A. Gammerman, G. Shafer, "Algorithmic Learning in a Random World" (2005), section 4.1, and V. Vovk,
"Conditional validity of inductive conformal predictors" (2012), for the split and the confidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy import stats

from weightproof.errors import InputError

CONFIDENCE = 0.95


def draws_needed(share: float, confidence: float = CONFIDENCE) -> int:
    """The fewest draws whose largest score bounds all but `share` of the draws to come.

    Example:
        >>> draws_needed(0.05), draws_needed(0.01)
        (59, 299)

    Raises:
        InputError: If `share` or `confidence` does not lie between 0 and 1.
    """
    _check(share, confidence)
    return math.ceil(math.log1p(-confidence) / math.log1p(-share))


def draws_for_rank(rank: int, share: float, confidence: float = CONFIDENCE) -> int:
    """The fewest draws of which `rank` may lie at or beyond limits that bound all but `share`.

    Example:
        >>> draws_for_rank(1, 0.05), draws_for_rank(2, 0.05), draws_for_rank(5, 0.05)
        (59, 93, 181)
    """
    number = draws_needed(share, confidence)
    while rank_allowed(number, share, confidence) < rank:
        number += 1
    return number


def share_supported(num_draws: int, confidence: float = CONFIDENCE) -> float:
    """The smallest share that so many draws can promise; 1 for none.

    Example:
        >>> round(share_supported(59), 4)
        0.0495
    """
    return 1.0 if num_draws < 1 else -math.expm1(math.log1p(-confidence) / num_draws)


def rank_allowed(num_draws: int, share: float, confidence: float = CONFIDENCE) -> int:
    """The largest k for which the k-th largest score bounds all but `share`; 0 where even the largest does not.

    Example:
        >>> rank_allowed(59, 0.05), rank_allowed(58, 0.05), rank_allowed(93, 0.05)
        (1, 0, 2)
    """
    _check(share, confidence)
    rank = 0
    while rank < num_draws and stats.binom.cdf(rank, num_draws, share) <= 1.0 - confidence:
        rank += 1
    return rank


def tolerance_limits(scores: Sequence[Sequence[float]], ranks: Sequence[int]) -> tuple[float, ...]:
    """Limits of several scores: of each the `rank`-th largest among the draws that no limit before set aside.

    Together they bound all but a share that `rank_allowed(number of draws, share)` allows for the sum of the ranks.

    Args:
        scores: Of each draw its scores, (num_draws, num_scores).
        ranks: From 1, one for each score.

    Raises:
        InputError: If there are fewer draws than ranks.

    Example:
        >>> tolerance_limits([(float(n), float(-n)) for n in range(93)], (1, 1))
        (92.0, 0.0)
    """
    if len(scores) < sum(ranks) or min(ranks) < 1:
        raise InputError(f"{len(scores)} draws have no limits of ranks {tuple(ranks)}")
    left = list(scores)
    found: list[float] = []
    for index, rank in enumerate(ranks):
        left.sort(key=lambda one, index=index: one[index], reverse=True)
        found.append(left[rank - 1][index])
        left = left[rank:]
    return tuple(found)


def _check(share: float, confidence: float) -> None:
    for name, value in (("share of false alarms", share), ("confidence", confidence)):
        if not 0.0 < value < 1.0:
            raise InputError(f"the {name} must lie between 0 and 1, not {value!r}")
