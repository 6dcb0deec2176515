"""Checked sums of losses per group, before and after a change, and the interval of their difference."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from weightproof.errors import InputError

Decision: TypeAlias = Literal["accept", "reject"]
Array: TypeAlias = NDArray[np.float64]

# Below this effective sample size no interval is trusted: benchmarks/coverage.py, docs/coverage.md.
MIN_EFFECTIVE_SIZE = 16.0
TAIL_LEVELS = (0.5, 0.9, 0.95, 0.99)
# Differences per unit of weight that are rounding of the inputs and of the limit's logarithm, not evidence.
_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class Interval:
    """What is known about a paired difference per unit of weight (after - before).

    Attributes:
        estimate: Ratio of sums.
        lower: Lower end; None where no interval can be made.
        upper: Upper end; None with `lower`.
        confidence: Two-sided, 1 - alpha.
        effective_size: (sum w)^2 / sum w^2.
        num_groups: Groups with weight.
        method: "bca", "percentile" (asked for, or where BCa is not defined), "confidence-sequence", "newcombe".
        undecided: Why the interval must not decide, None where it may.
    """

    estimate: float
    lower: float | None
    upper: float | None
    confidence: float
    effective_size: float
    num_groups: int
    method: str
    undecided: str | None = None

    def decide(self, limit: float) -> Decision | None:
        """Compare the interval, never the estimate, with the largest difference allowed.

        Args:
            limit: For perplexity ratios up to tau, log(tau); for an improvement by at least e, -e.

        Returns:
            "accept" when all of the interval is at most the limit, "reject" when all of it is above, None when
            it holds the limit or must not be trusted. An end within rounding (1e-12) of the limit is at it.
        """
        if self.undecided is not None or self.lower is None or self.upper is None:
            return None
        if self.upper <= limit + _ROUNDING:
            return "accept"
        return "reject" if self.lower > limit + _ROUNDING else None


@dataclass(frozen=True, slots=True)
class Tail:
    """How the differences per unit of weight spread over groups; a mean hides harm that few groups carry.

    Attributes:
        quantiles: Level -> difference, each group counted once, linear between neighbours.
        largest: The largest difference.
        share_above: Share of the weight in groups whose difference is above `threshold`.
        threshold: As asked for.
    """

    quantiles: dict[float, float]
    largest: float
    share_above: float
    threshold: float


class PairedSums:
    """Sums of losses per group before and after a change, with the groups' weights.

    Groups of weight 0 (nothing scored) are left out; the rest is kept in an order of its own, so that nothing
    computed from it depends on the order given.

    Args:
        before: (num_groups,) sums of losses before the change.
        after: (num_groups,) the same after it.
        weight: (num_groups,) scored tokens or examples.

    Attributes:
        before: As given, without groups of weight 0, sorted.
        after: The same.
        weight: The same.

    Raises:
        InputError: If the three are not finite one-dimensional arrays of one length, if a weight is negative, or
            0 with losses, or if all are 0.
    """

    def __init__(self, before: ArrayLike, after: ArrayLike, weight: ArrayLike) -> None:
        arrays = vector("before", before), vector("after", after), vector("weight", weight)
        _check_lengths(*arrays)
        if arrays[2].min() < 0:
            raise InputError(f"the weight of group {int(arrays[2].argmin())} is negative: {arrays[2].min()}")
        empty = arrays[2] == 0
        if np.any(empty & ((arrays[0] != 0) | (arrays[1] != 0))):
            raise InputError("a group has losses and weight 0: a weight is the number of scored tokens or examples")
        if empty.all():
            raise InputError("every group has weight 0: nothing was scored, so there is no mean")
        order = np.lexsort((arrays[2], arrays[1], arrays[0]))
        self.before, self.after, self.weights = (array[order[~empty[order]]] for array in arrays)

    @classmethod
    def of_scores(cls, before: ArrayLike, after: ArrayLike, weight: ArrayLike | None = None) -> PairedSums:
        """One score per example in place of sums of losses; the estimate is the difference of weighted means.

        Scores of two values (right or wrong) rarely change, and where none has changed yet their spread says
        nothing: compare them with `proportions.newcombe`.

        Args:
            before: (num_examples,) scores before the change. Where more is better, negate both.
            after: (num_examples,) scores after it.
            weight: (num_examples,); equal when not given.

        Raises:
            InputError: As the class.
        """
        scores = vector("before", before), vector("after", after)
        weights = np.ones_like(scores[0]) if weight is None else vector("weight", weight)
        _check_lengths(*scores, weights)
        return cls(scores[0] * weights, scores[1] * weights, weights)

    @property
    def num_groups(self) -> int:
        """Groups with weight."""
        return len(self.weights)

    @cached_property
    def difference(self) -> Array:
        """(num_groups,) after - before."""
        return self.after - self.before

    @cached_property
    def estimate(self) -> float:
        """(sum after - sum before) / sum weight: of losses in nats, the logarithm of the perplexity ratio."""
        return float(self.difference.sum() / self.weights.sum())

    @cached_property
    def effective_size(self) -> float:
        """How many groups of equal weight are worth as much as these: (sum w)^2 / sum w^2 (Kish, 1965)."""
        share = self.weights / self.weights.sum()
        return float(1.0 / (share @ share))

    def tail(self, threshold: float) -> Tail:
        """Spread of the groups' own differences, and the share of the weight above a threshold."""
        per_unit = self.difference / self.weights
        return Tail(
            quantiles={level: float(np.quantile(per_unit, level)) for level in TAIL_LEVELS},
            largest=float(per_unit.max()),
            share_above=float(self.weights[per_unit > threshold].sum() / self.weights.sum()),
            threshold=threshold,
        )

    @property
    def is_constant(self) -> bool:
        """Whether every group has the same difference per unit of weight, up to the rounding of the losses."""
        residual = np.abs(self.difference - self.estimate * self.weights)
        return bool(np.all(residual <= 1e-13 * (np.abs(self.before) + np.abs(self.after))))


def too_small(size: float, minimum: float) -> str | None:
    """The sentence for an effective sample size below the minimum, None at or above it."""
    if size >= minimum * (1.0 - 1e-9):
        return None
    return f"effective sample too small: {size:.1f} of at least {minimum:g}"


def check_options(alpha: float, min_effective_size: float) -> None:
    """Raise InputError unless alpha is in (0, 1) and the minimum at least 1."""
    if not 0 < alpha < 1:
        raise InputError(f"alpha must be between 0 and 1, for example 0.05, got {alpha}")
    if not min_effective_size >= 1:
        raise InputError(f"min_effective_size must be at least 1, got {min_effective_size}")


def vector(name: str, values: ArrayLike) -> Array:
    """A finite, non-empty, one-dimensional float64 array, or InputError naming `name`."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be numbers, one per group: {error}") from error
    if array.ndim != 1 or not len(array):
        raise InputError(f"{name} must be a list of numbers, one per group, got an array of shape {array.shape}")
    if not np.isfinite(array).all():
        first = int(np.flatnonzero(~np.isfinite(array))[0])
        raise InputError(f"{name} of group {first} is not finite: {array[first]}")
    return array


def _check_lengths(before: Array, after: Array, weight: Array) -> None:
    if not len(before) == len(after) == len(weight):
        raise InputError(f"groups are not paired: {len(before)} before, {len(after)} after, {len(weight)} weights")
