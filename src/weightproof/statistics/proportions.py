"""Accuracy before and after a change on the same examples: Newcombe's interval and McNemar's test.

Sources: R. G. Newcombe, "Improved confidence intervals for the difference between binomial proportions based on
paired data", Statistics in Medicine 17 (1998), method 10; E. B. Wilson, JASA 22 (1927); Q. McNemar, Psychometrika
12 (1947), exact and, after M. W. Fagerland, S. Lydersen and P. Laake, BMC Medical Research Methodology 13 (2013),
mid-p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from weightproof.errors import InputError
from weightproof.statistics.paired_sums import Interval, check_options, too_small

# What one answer can be. A tie is an answer that cannot be told from a right one, such as equal scores.
ANSWERS = ("right", "wrong", "tie", "abstained")
# Below this number of examples Newcombe's interval decides nothing.
MIN_EXAMPLES = 16


@dataclass(frozen=True, slots=True)
class PairedCounts:
    """How many examples were right before and after a change.

    Attributes:
        both: Right before and after.
        lost: Right before only.
        gained: Right after only.
        neither: Wrong before and after.
        excluded: Examples left out, because there was no answer before the change.

    Raises:
        InputError: If a count is not a whole number of at least 0.
    """

    both: int
    lost: int
    gained: int
    neither: int
    excluded: int = 0

    def __post_init__(self) -> None:
        """Check that all of them count something."""
        for name in self.__slots__:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise InputError(f"{name} must be a whole number of examples, at least 0, got {value!r}")

    @property
    def num_examples(self) -> int:
        """Examples compared."""
        return self.both + self.lost + self.gained + self.neither

    @property
    def before(self) -> float:
        """Accuracy before; NaN with no examples."""
        return (self.both + self.lost) / self.num_examples if self.num_examples else math.nan

    @property
    def after(self) -> float:
        """Accuracy after; NaN with no examples."""
        return (self.both + self.gained) / self.num_examples if self.num_examples else math.nan


def paired_counts(before: Sequence[str], after: Sequence[str], *, ties: str = "right") -> PairedCounts:
    """Count pairs of answers to the same examples.

    An example without an answer before the change has no baseline and is left out. One with an answer before and
    none after counts as wrong after: otherwise a model could hide damage by not answering.

    Args:
        before: For each example one of `ANSWERS`.
        after: The same after the change, in the same order.
        ties: What a tie counts as, "right" or "wrong".

    Raises:
        InputError: If the two differ in length, are empty, or hold anything else.
    """
    if len(before) != len(after) or not len(before):
        raise InputError(f"answers are not paired: {len(before)} before and {len(after)} after")
    if ties not in ("right", "wrong"):
        raise InputError(f"ties must count as 'right' or 'wrong', got {ties!r}")
    unknown = next((answer for answer in (*before, *after) if answer not in ANSWERS), None)
    if unknown is not None:
        raise InputError(f"unknown answer {unknown!r}: use one of {', '.join(ANSWERS)}")
    right = {"right"} | ({"tie"} if ties == "right" else set())
    pairs = [(was in right, now in right) for was, now in zip(before, after, strict=True) if was != "abstained"]
    return PairedCounts(
        both=pairs.count((True, True)),
        lost=pairs.count((True, False)),
        gained=pairs.count((False, True)),
        neither=pairs.count((False, False)),
        excluded=len(before) - len(pairs),
    )


def newcombe(counts: PairedCounts, *, alpha: float = 0.05, min_examples: int = MIN_EXAMPLES) -> Interval:
    """Interval of the difference of accuracies, after - before: Newcombe's method 10.

    Wilson's intervals of both accuracies are joined, with the correlation of the pairs corrected for continuity.
    For a limit on the *loss* of accuracy, decide on `negated(newcombe(...))`.

    Args:
        counts: The pairs.
        alpha: Two-sided error, in (0, 1).
        min_examples: Below it the interval says that it must not decide.

    Raises:
        InputError: If there are no examples, or alpha is not in (0, 1).
    """
    check_options(alpha, min_examples)
    n = counts.num_examples
    if not n:
        raise InputError("no example was answered before the change, so there is no accuracy to compare with")
    low_before, high_before = wilson(counts.both + counts.lost, n, alpha=alpha)
    low_after, high_after = wilson(counts.both + counts.gained, n, alpha=alpha)
    difference, phi = counts.after - counts.before, _correlation(counts)
    down = _joined(counts.after - low_after, high_before - counts.before, phi)
    up = _joined(high_after - counts.after, counts.before - low_before, phi)
    return Interval(
        estimate=difference,
        lower=difference - down,
        upper=difference + up,
        confidence=1.0 - alpha,
        effective_size=float(n),
        num_groups=n,
        method="newcombe",
        undecided=too_small(n, min_examples),
    )


def wilson(num_right: int, num_examples: int, *, alpha: float = 0.05) -> tuple[float, float]:
    """Wilson's score interval of one proportion."""
    z = float(stats.norm.isf(alpha / 2))
    centre = num_right + z * z / 2
    half = z * math.sqrt(num_right * (num_examples - num_right) / num_examples + z * z / 4)
    lower, upper = ((centre + sign * half) / (num_examples + z * z) for sign in (-1, 1))
    return max(0.0, lower), min(1.0, upper)


def mcnemar(counts: PairedCounts, *, method: str = "mid-p") -> float:
    """Two-sided p-value of "as many examples were lost as gained", from the examples that changed.

    Args:
        counts: The pairs.
        method: "mid-p", or "exact", which is never below it. Both are 1 when nothing changed.

    Raises:
        InputError: If the method is another one.
    """
    if method not in ("exact", "mid-p"):
        raise InputError(f"unknown McNemar method {method!r}: use exact or mid-p")
    fewer, changed = min(counts.lost, counts.gained), counts.lost + counts.gained
    if not changed:
        return 1.0
    tail = float(stats.binom.cdf(fewer, changed, 0.5))
    at = float(stats.binom.pmf(fewer, changed, 0.5))
    if method == "exact":
        return min(1.0, 2.0 * tail)
    return 1.0 - at / 2 if 2 * fewer == changed else 2.0 * tail - at


def negated(found: Interval) -> Interval:
    """The interval of before - after, in which less is better: for limits on how much accuracy may be lost."""
    return Interval(
        estimate=-found.estimate,
        lower=None if found.upper is None else -found.upper,
        upper=None if found.lower is None else -found.lower,
        confidence=found.confidence,
        effective_size=found.effective_size,
        num_groups=found.num_groups,
        method=found.method,
        undecided=found.undecided,
    )


def _correlation(counts: PairedCounts) -> float:
    """Newcombe's phi: 0 where a margin is empty, and shrunk by n / 2 towards 0 where positive."""
    right_before, right_after = counts.both + counts.lost, counts.both + counts.gained
    n = counts.num_examples
    product = right_before * (n - right_before) * right_after * (n - right_after)
    if product == 0:
        return 0.0
    determinant = counts.both * counts.neither - counts.lost * counts.gained
    shrunk = max(determinant - n / 2, 0.0) if determinant > 0 else float(determinant)
    return shrunk / math.sqrt(product)


def _joined(one: float, other: float, phi: float) -> float:
    return math.sqrt(max(0.0, one * one - 2.0 * phi * one * other + other * other))
