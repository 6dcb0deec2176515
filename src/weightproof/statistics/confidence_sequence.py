"""A confidence sequence for a ratio of sums: an interval that holds at every number of groups at once.

For each theta, z_i = (after_i - before_i) - theta * weight_i has mean zero when theta is the truth. Mixing the
t statistic of z_1 .. z_n over normal effect sizes gives a test martingale (T. L. Lai, "On confidence
sequences", Annals of Statistics 4, 1976; H. Wang and A. Ramdas, "Anytime-valid t-tests and confidence sequences
for Gaussian means with unknown variance", arXiv 2310.03722); by Ville's inequality it ever exceeds 1 / alpha
with probability alpha at most. The theta not rejected form an interval by Fieller's theorem (JRSS B 16, 1954).
Losses are skewed (a few windows suffer most), and skewness is what makes a t test accept too early: where it
widens the interval, t is taken through the cubic transformation of P. Hall, "On the removal of skewness by
transformation", JRSS B 54 (1992). It never narrows it.
Valid for normal z. For others it holds asymptotically, and by simulation from the minimum effective sample size
on (benchmarks/coverage.py, docs/coverage.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from weightproof.errors import InputError
from weightproof.statistics.paired_sums import Decision, Interval, PairedSums, check_options, too_small

# Below this effective sample size nothing is decided early.
MIN_SEQUENTIAL_SIZE = 20.0
# Nothing is accepted before as many groups were read: harm that few groups carry is not seen in fewer.
MIN_GROUPS_TO_ACCEPT = 50
# Prior variance of the effect size (mean over standard deviation of z) that the interval is tuned for.
_EFFECT_VARIANCE = 1.0


class Sequential:
    """Decide against a limit as soon as the groups read so far allow it, at any number of looks.

    Groups must come in random order (`paired.random_order`), chosen without their losses after the change.
    Memory does not grow with their number. Differences must vary: of scores with two values that have not changed
    yet, the spread is 0 and says nothing.

    Args:
        limit: The largest difference allowed: log(tau) for perplexity ratios up to tau.
        alpha: Two-sided error over all looks together, in (0, 1); a wrong acceptance has half of it.
        min_effective_size: Nothing is decided below it.
        accept_from: Nothing is accepted before as many groups; a rejection may come earlier.

    Raises:
        InputError: If an argument cannot be used.
    """

    def __init__(
        self,
        limit: float,
        alpha: float = 0.05,
        *,
        min_effective_size: float = MIN_SEQUENTIAL_SIZE,
        accept_from: int = MIN_GROUPS_TO_ACCEPT,
    ) -> None:
        if not math.isfinite(limit):
            raise InputError(f"the limit of a sequential test must be a finite number, got {limit}")
        check_options(alpha, min_effective_size)
        self._limit = float(limit)
        self._alpha = alpha
        self._min_effective_size = min_effective_size
        self._accept_from = accept_from
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
            found = self.interval().decide(self._limit) if self._decision is None else None
            if found == "reject" or (found == "accept" and self.num_groups >= self._accept_from):
                self._decision = found
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
    for difference, weight in zip(sums.difference.tolist(), sums.weights.tolist(), strict=True):
        moments.add(difference, weight)
    return moments.interval(alpha, min_effective_size)


@dataclass(slots=True)
class _Moments:
    """Means and centred second and third moments of differences d and weights w, grown by one group at a time.

    The updates are those of P. Pebay, "Formulas for robust, one-pass parallel computation of covariances and
    arbitrary-order statistical moments", Sandia report SAND2008-6212.
    """

    num_groups: int = 0
    mean_difference: float = 0.0
    mean_weight: float = 0.0
    dd: float = 0.0
    dw: float = 0.0
    ww: float = 0.0
    ddd: float = 0.0
    ddw: float = 0.0
    dww: float = 0.0
    www: float = 0.0

    def add(self, difference: float, weight: float) -> None:
        before, n = self.num_groups, self.num_groups + 1
        d, w = difference - self.mean_difference, weight - self.mean_weight
        second, third = before / n, before * (before - 1) / n**2
        self.ddd += d**3 * third - 3 * d * self.dd / n
        self.ddw += d * d * w * third - (2 * d * self.dw + w * self.dd) / n
        self.dww += d * w * w * third - (2 * w * self.dw + d * self.ww) / n
        self.www += w**3 * third - 3 * w * self.ww / n
        self.dd += d * d * second
        self.dw += d * w * second
        self.ww += w * w * second
        self.mean_difference += d / n
        self.mean_weight += w / n
        self.num_groups = n

    @property
    def effective_size(self) -> float:
        mean_square = self.ww / self.num_groups + self.mean_weight**2
        return self.num_groups * self.mean_weight**2 / mean_square

    def interval(self, alpha: float, min_effective_size: float) -> Interval:
        theta = self.mean_difference / self.mean_weight
        ends = self._ends(theta, alpha)
        undecided = too_small(self.effective_size, min_effective_size)
        if ends is None and undecided is None:
            groups = f"{self.num_groups} groups, worth {self.effective_size:.1f} equal ones"
            undecided = f"too unequal for an interval: {groups}"
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
        """The theta whose t statistic is not rejected, from one end to the other; None where they are unbounded."""
        n = self.num_groups
        critical = _critical(n, alpha)
        if critical is None:
            return None
        squares = max(0.0, self.dd - theta * (2 * self.dw - theta * self.ww))
        low, high = _widened_for_skewness(critical, self._skewness(theta, squares), n)
        steps = self._step(theta, squares, high, -1), self._step(theta, squares, low, 1)
        return None if steps[0] is None or steps[1] is None else (theta + steps[0], theta + steps[1])

    def _step(self, theta: float, squares: float, critical: float, sign: int) -> float | None:
        """The u of one sign with n (u mean_w)^2 = critical^2 SS(theta + u) / (n - 1).

        SS(theta + u) = squares - 2 u slope + u^2 ww is the centred sum of squares of z at theta + u.
        """
        slope = self.dw - theta * self.ww
        scale = critical**2 / (self.num_groups * (self.num_groups - 1))
        leading = self.mean_weight**2 - scale * self.ww
        if leading <= 0:
            return None
        root = math.sqrt((scale * slope) ** 2 + leading * scale * squares)
        return (-scale * slope + sign * root) / leading

    def _skewness(self, theta: float, squares: float) -> float:
        """Of z at theta; 0 where z does not vary beyond rounding."""
        if squares <= 1e-24 * (self.dd + theta * theta * self.ww):
            return 0.0
        cubes = self.ddd - theta * (3 * self.ddw - theta * (3 * self.dww - theta * self.www))
        return math.sqrt(self.num_groups) * cubes / squares**1.5


def _critical(num_groups: int, alpha: float) -> float | None:
    """The largest |t| that is not rejected; None where nothing is rejected yet.

    With effect sizes N(0, g) and the standard deviation integrated out, the martingale is
    (1 + n g)^(-1/2) [(1 + x) / (1 + x / (1 + n g))]^(n / 2), x = t^2 / (n - 1). Here it is set to 1 / alpha.
    """
    spread = 1.0 + num_groups * _EFFECT_VARIANCE
    ratio = math.exp(2.0 / num_groups * (0.5 * math.log(spread) - math.log(alpha)))
    if num_groups < 2 or ratio >= spread:
        return None
    return math.sqrt((num_groups - 1) * (ratio - 1.0) / (1.0 - ratio / spread))


def _widened_for_skewness(critical: float, skewness: float, num_groups: int) -> tuple[float, float]:
    """Smallest and largest t not rejected: -critical and critical, or beyond, where skewness asks for it.

    Hall's transformation is h(t) = t + a t^2 + a^2 t^3 / 3 + a / 2 with a = skewness / (3 sqrt n); its inverse at
    the critical values is closed.
    """
    a = skewness / (3.0 * math.sqrt(num_groups))
    if abs(a) < 1e-9:
        return -critical, critical
    low, high = ((math.cbrt(1.0 + 3.0 * a * (value - a / 2.0)) - 1.0) / a for value in (-critical, critical))
    return min(low, -critical), max(high, critical)
