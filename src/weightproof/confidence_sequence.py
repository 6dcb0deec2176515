"""A confidence sequence for a ratio of sums: an interval that holds at every number of groups at once.

For each theta, z_i = (after_i - before_i) - theta * weight_i has mean zero when theta is the truth. Mixing the
t statistic of z_1 .. z_n over normal effect sizes gives a test martingale (T. L. Lai, "On confidence
sequences", Annals of Statistics 4, 1976; H. Wang and A. Ramdas, "Anytime-valid t-tests and confidence sequences
for Gaussian means with unknown variance", arXiv 2310.03722); by Ville's inequality it ever exceeds 1 / alpha
with probability alpha. The theta not rejected form an interval by Fieller's theorem (JRSS B 16, 1954).
Exact for normal z. For others it holds asymptotically, and by simulation from the minimum effective sample size
on (benchmarks/coverage.py, docs/coverage.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from weightproof.errors import InputError
from weightproof.paired_sums import MIN_EFFECTIVE_SIZE, Decision, Interval, PairedSums, check_options, too_small

# Prior variance of the effect size (mean over standard deviation of z) that the interval is tuned for.
_EFFECT_VARIANCE = 1.0


class Sequential:
    """Decide against a limit as soon as the groups read so far allow it, at any number of looks.

    Groups must come in random order (`paired.random_order`), chosen without their losses after the change.
    Memory does not grow with their number.

    Args:
        limit: The largest difference allowed: log(tau) for perplexity ratios up to tau.
        alpha: Two-sided error over all looks together, in (0, 1); a wrong acceptance has half of it.
        min_effective_size: Nothing is decided below it.

    Raises:
        InputError: If an argument cannot be used.
    """

    def __init__(self, limit: float, alpha: float = 0.05, *, min_effective_size: float = MIN_EFFECTIVE_SIZE) -> None:
        if not math.isfinite(limit):
            raise InputError(f"the limit of a sequential test must be a finite number, got {limit}")
        check_options(alpha, min_effective_size)
        self._limit = float(limit)
        self._alpha = alpha
        self._min_effective_size = min_effective_size
        self._moments = _Moments()
        self._decision: Decision | None = None

    @property
    def decision(self) -> Decision | None:
        """The first decision reached; further groups do not change it."""
        return self._decision

    @property
    def num_groups(self) -> int:
        """Groups with weight added so far."""
        return self._moments.num_groups

    @property
    def total_weight(self) -> float:
        """Tokens or examples of those groups."""
        return self._moments.num_groups * self._moments.mean_weight

    def add(self, before: float, after: float, weight: float) -> Decision | None:
        """Add one group and look.

        Args:
            before: Sum of its losses before the change.
            after: The same after it.
            weight: Its tokens or examples; a group of weight 0 is left out.

        Returns:
            `decision`.

        Raises:
            InputError: If a value is not finite, or the weight is negative or 0 with losses.
        """
        if not (math.isfinite(before) and math.isfinite(after) and math.isfinite(weight)):
            raise InputError(
                f"group {self.num_groups} of a sequential test has a value that is not finite: before {before}, "
                f"after {after}, weight {weight}; judge non-finite losses before their differences"
            )
        if weight < 0 or (weight == 0 and (before or after)):
            raise InputError(f"group {self.num_groups} of a sequential test has losses, but weight {weight}")
        if weight > 0:
            self._moments.add(float(after) - float(before), float(weight))
            if self._decision is None:
                self._decision = self.interval().decide(self._limit)
        return self._decision

    def interval(self) -> Interval:
        """The confidence sequence at the groups added so far.

        Raises:
            InputError: If there is none yet.
        """
        if not self.num_groups:
            raise InputError("a sequential test has no interval before its first group")
        return self._moments.interval(self._alpha, self._min_effective_size)


def confidence_sequence(sums: PairedSums, alpha: float, min_effective_size: float) -> Interval:
    """The interval of `Sequential` after all groups of a sample, whatever their order was."""
    moments = _Moments()
    for difference, weight in zip(sums.difference.tolist(), sums.weight.tolist(), strict=True):
        moments.add(difference, weight)
    return moments.interval(alpha, min_effective_size)


@dataclass(slots=True)
class _Moments:
    """Means and centred second moments of differences and weights, one group at a time (Welford)."""

    num_groups: int = 0
    mean_difference: float = 0.0
    mean_weight: float = 0.0
    difference_squares: float = 0.0
    weight_squares: float = 0.0
    products: float = 0.0

    def add(self, difference: float, weight: float) -> None:
        self.num_groups += 1
        to_difference, to_weight = difference - self.mean_difference, weight - self.mean_weight
        self.mean_difference += to_difference / self.num_groups
        self.mean_weight += to_weight / self.num_groups
        self.difference_squares += to_difference * (difference - self.mean_difference)
        self.weight_squares += to_weight * (weight - self.mean_weight)
        self.products += to_difference * (weight - self.mean_weight)

    @property
    def effective_size(self) -> float:
        mean_square = self.weight_squares / self.num_groups + self.mean_weight**2
        return self.num_groups * self.mean_weight**2 / mean_square

    def interval(self, alpha: float, min_effective_size: float) -> Interval:
        theta = self.mean_difference / self.mean_weight
        ends = self._ends(theta, alpha)
        undecided = too_small(self.effective_size, min_effective_size)
        if ends is None and undecided is None:
            undecided = f"weights of {self.num_groups} groups are too unequal for an interval"
        return Interval(
            estimate=theta,
            lower=None if ends is None else ends[0],
            upper=None if ends is None else ends[1],
            confidence=1.0 - alpha,
            effective_size=self.effective_size,
            num_groups=self.num_groups,
            method="confidence-sequence",
            undecided=undecided,
        )

    def _ends(self, theta: float, alpha: float) -> tuple[float, float] | None:
        """Of all theta + u with n (u mean_weight)^2 <= critical * SS(theta + u); None where u is unbounded."""
        critical = _critical(self.num_groups, alpha)
        if critical is None:
            return None
        # SS(theta + u) = residual - 2 u slope + u^2 weight_squares, the centred sum of squares of z.
        residual = self.difference_squares - theta * (2 * self.products - theta * self.weight_squares)
        slope = self.products - theta * self.weight_squares
        scale = critical / self.num_groups
        leading = self.mean_weight**2 - scale * self.weight_squares
        if leading <= 0:
            return None
        root = math.sqrt((scale * slope) ** 2 + leading * scale * max(residual, 0.0))
        return theta + (-scale * slope - root) / leading, theta + (-scale * slope + root) / leading


def _critical(num_groups: int, alpha: float) -> float | None:
    """The largest t^2 / (n - 1) that is not rejected; None where nothing is rejected yet.

    With effect sizes N(0, g) and the standard deviation integrated out, the martingale is
    (1 + n g)^(-1/2) [(1 + x) / (1 + x / (1 + n g))]^(n / 2), x = t^2 / (n - 1). Here it is set to 1 / alpha.
    """
    spread = 1.0 + num_groups * _EFFECT_VARIANCE
    ratio = math.exp(2.0 / num_groups * (0.5 * math.log(spread) - math.log(alpha)))
    return None if num_groups < 2 or ratio >= spread else (ratio - 1.0) / (1.0 - ratio / spread)
