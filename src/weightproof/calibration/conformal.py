"""How many draws, and which of their largest scores, make a limit that holds for draws to come.

Wilks' tolerance bound: of n independent draws of one distribution, whatever it is, the share p of it that lies beyond
the k-th largest is at most that of a Beta(k, n - k + 1) variable. So that share is at most p with confidence 1 - b as
soon as P(Binomial(n, p) <= k - 1) <= b; for the largest (k = 1) as soon as (1 - p)^n <= b. Draws from several models,
equally many of each, are independent without being equally distributed: then p is the mean over the models, and the
bound holds as long as k <= n p (W. Hoeffding, "On the distribution of the number of successes in independent trials",
Ann. Math. Statist. 27 (1956), theorem 4).

References: S. S. Wilks, "Determination of sample sizes for setting tolerance limits", Ann. Math. Statist. 12 (1941).
Scores taken with shapes that other draws fixed are split conformal prediction: V. Vovk, A. Gammerman, G. Shafer,
"Algorithmic Learning in a Random World" (2005), section 4.1; V. Vovk, "Conditional validity of inductive conformal
predictors" (2012), for the confidence.
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


def tolerance_limit(scores: Sequence[float], share: float, confidence: float = CONFIDENCE) -> float:
    """The score that at most `share` of the draws to come exceed, with this confidence.

    Raises:
        InputError: If there are too few scores.
    """
    rank = rank_allowed(len(scores), share, confidence)
    if rank == 0:
        raise InputError(
            f"{len(scores)} draws cannot bound all but {share:g}: {draws_needed(share, confidence)} are needed, and "
            f"these would do for {share_supported(len(scores), confidence):.2g}"
        )
    return sorted(scores, reverse=True)[rank - 1]


def _check(share: float, confidence: float) -> None:
    for name, value in (("share of false alarms", share), ("confidence", confidence)):
        if not 0.0 < value < 1.0:
            raise InputError(f"the {name} must lie between 0 and 1, not {value!r}")
