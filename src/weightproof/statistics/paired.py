"""Paired statistics on per-group sums: how much worse is the loss after a change, and how sure is that.

A group is what is exchangeable: a document, or a window where documents are unknown. It brings the sum of its
losses before and after the change and its weight (scored tokens, or examples). The parameter is a ratio of
sums, in nats per token for losses, where it is the logarithm of the perplexity ratio:

    theta = (sum after - sum before) / sum weight

What guards and metrics use, all of it from here:

    PairedSums(before, after, weight)      .estimate .effective_size .num_groups .before .after .weights
                 .tail(threshold) -> Tail
    PairedSums.of_scores(before, after, weight=None)         one score per example in place of sums
    interval(sums, *, alpha=.05, method="bca", replicates=5000, min_effective_size=MIN_EFFECTIVE_SIZE) -> Interval
    Interval     .estimate .lower .upper .confidence .effective_size .num_groups .method .undecided
                 .decide(limit) -> "accept" | "reject" | None
    Sequential(limit, alpha=.05, *, min_effective_size=MIN_SEQUENTIAL_SIZE, accept_from=MIN_GROUPS_TO_ACCEPT)
                 .add(before, after, weight) -> the same, .decision .interval() .num_groups .total_weight
    random_order(num_groups, digest)       the order in which a sequential test reads the groups
    perplexity(nll)                        exp that gives inf where it overflows

`alpha` is the error of a two-sided interval; a decision uses one end, so that each wrong decision has half of
it. A test that may stop early and looks once more at the end spends two errors: give
`SEQUENTIAL_SHARE * alpha` to `Sequential`, and the rest to `interval` when it has not decided.

Every degenerate sample has an answer: equal losses give the interval (0, 0), a constant difference per token one
of zero width, few effective groups one that says `undecided`. What is no sample (NaN, empty, two-dimensional,
negative weights) is an InputError.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

from weightproof.errors import InputError
from weightproof.statistics.bootstrap import MIN_DEGREES_OF_FREEDOM, bootstrap, degrees_of_freedom
from weightproof.statistics.confidence_sequence import (
    MIN_GROUPS_TO_ACCEPT,
    MIN_SEQUENTIAL_SIZE,
    Sequential,
    confidence_sequence,
)
from weightproof.statistics.paired_sums import (
    MIN_EFFECTIVE_SIZE,
    Decision,
    Interval,
    PairedSums,
    Tail,
    check_options,
    too_small,
)

__all__ = [
    "METHODS",
    "MIN_EFFECTIVE_SIZE",
    "MIN_GROUPS_TO_ACCEPT",
    "MIN_SEQUENTIAL_SIZE",
    "SEQUENTIAL_SHARE",
    "Decision",
    "Interval",
    "PairedSums",
    "Sequential",
    "Tail",
    "interval",
    "perplexity",
    "random_order",
]

METHODS = ("bca", "percentile", "confidence-sequence")
# The part of the error that a sequential test spends when a fixed-sample interval follows at the end.
SEQUENTIAL_SHARE = 0.4


def interval(
    sums: PairedSums,
    *,
    alpha: float = 0.05,
    method: str = "bca",
    replicates: int = 5000,
    min_effective_size: float = MIN_EFFECTIVE_SIZE,
) -> Interval:
    """Interval of the ratio of sums; groups are resampled together with their weights.

    The same in any order of the groups, in any unit, on every machine.

    Args:
        sums: The groups.
        alpha: Two-sided error, in (0, 1).
        method: "bca"; "percentile"; "confidence-sequence": the one of `Sequential` after all groups.
        replicates: Bootstrap resamples, at least 2 / alpha.
        min_effective_size: Below it the interval says that it must not decide.

    Raises:
        InputError: If `alpha`, `method`, `replicates` or `min_effective_size` cannot be used.
    """
    check_options(alpha, min_effective_size)
    if method not in METHODS:
        raise InputError(f"unknown interval method {method!r}: use one of {', '.join(METHODS)}")
    if method == "confidence-sequence":
        return confidence_sequence(sums, alpha, min_effective_size)
    if replicates < 2 / alpha:
        raise InputError(f"{replicates} bootstrap replicates are too few for alpha {alpha}: give at least 2 / alpha")
    used, (lower, upper) = bootstrap(sums, alpha, method, replicates)
    return Interval(
        estimate=sums.estimate,
        lower=lower,
        upper=upper,
        confidence=1.0 - alpha,
        effective_size=sums.effective_size,
        num_groups=sums.num_groups,
        method=used,
        undecided=too_small(sums.effective_size, min_effective_size) or _too_few_carry(sums),
    )


def _too_few_carry(sums: PairedSums) -> str | None:
    freedom = degrees_of_freedom(sums)
    if freedom >= MIN_DEGREES_OF_FREEDOM or sums.is_constant:
        return None
    return (
        f"effective sample too small: {freedom:.1f} degrees of freedom of at least {MIN_DEGREES_OF_FREEDOM:g}, "
        "because a few groups hold most of the weight"
    )


def random_order(num_groups: int, digest: str) -> NDArray[np.int64]:
    """A random order of groups that anyone can repeat: seeded by a digest of what they are.

    Args:
        num_groups: How many.
        digest: Such as the digest of the windows. It must not depend on losses after the change.
    """
    seed = int.from_bytes(hashlib.sha256(digest.encode()).digest(), "big")
    return np.random.default_rng(seed).permutation(num_groups)


def perplexity(nll: float) -> float:
    """exp(nll), inf where that overflows; of a difference, the perplexity ratio."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
