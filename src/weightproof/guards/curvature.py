"""Curvature guard (advice): the loss change of an edit, foreseen from Kronecker factors, and which matrix is to blame.

1/2 tr(G E A E') per matrix and in sum, without a forward pass. It ranks and locates; it never accepts and never
rejects: it is blind to norms and biases, loud on changes that preserve the function, and falls short on large edits.
It speaks only where factors were given (`GuardSession(model, factors=...)`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, final

from weightproof.guards.conclude import conclude, unmeasured
from weightproof.guards.limits import check_number
from weightproof.types import CurvatureReading, LossForecast, Measurement, Outcome, Readings, Verdict

STATISTIC = "predicted_loss_change"
WHOLE = "all matrices"


@dataclass(frozen=True, slots=True)
class CurvatureLimits:
    """Limits of the curvature guard.

    Attributes:
        predicted: Nats per token, summed over the matrices; WARN above. docs/guards/curvature.md: a perplexity ratio
            of 1.01, and about as far as predictions were found to hold.
        trust: ||E||_F / ||W||_F of a matrix above which its quadratic is said not to hold (docs/guards/curvature.md).
        holds: Nats per token, summed, up to which the number and not only the order was found to hold
            (docs/kfac.md, foreseeing a loss change).
    """

    predicted: float = 0.01
    trust: float = 0.3
    holds: float = 0.1

    def __post_init__(self) -> None:
        """Refuse wrong values: PolicyError names the key."""
        check_number("predicted", self.predicted, strict=True)
        check_number("trust", self.trust, strict=True)
        check_number("holds", self.holds, strict=True)


@final
class Curvature:
    """The predicted loss change against a limit; a warning at most."""

    name: ClassVar[str] = "curvature"
    tier: ClassVar[str] = "advice"
    optional: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"curvature"})
    Limits: ClassVar[type[CurvatureLimits]] = CurvatureLimits

    def judge(self, before: Readings, after: Readings, limits: CurvatureLimits) -> Verdict:
        """Judge the sum over the matrices, and report each of them."""
        del before  # the prediction is of the change itself
        forecast = after.curvature
        if forecast is None:
            nothing = unmeasured(after, "curvature", "no factors were given (GuardSession(..., factors=))")
            return conclude(self.name, (), coverage=(0, 0), nothing=nothing)
        measured = sum(one.reason is None for one in forecast.matrices)
        measurements = [_of_matrix(one, limits) for one in forecast.matrices]
        if measured:
            measurements.insert(0, _in_sum(forecast, limits))
        coverage = (measured, len(forecast.matrices) + len(forecast.not_covered))
        verdict = conclude(self.name, measurements, coverage=coverage, nothing=_nothing(forecast))
        return replace(verdict, reason=in_words(forecast, limits)) if measured else verdict


def ranked(forecast: LossForecast) -> list[CurvatureReading]:
    """The measured matrices, the one that is to blame most first."""
    measured = [one for one in forecast.matrices if one.predicted is not None]
    return sorted(measured, key=lambda one: -(one.predicted or 0.0))


def total(forecast: LossForecast) -> float:
    """Sum over the measured matrices, nats per token."""
    return math.fsum(one.predicted or 0.0 for one in forecast.matrices)


def is_far(one: CurvatureReading, limits: CurvatureLimits) -> bool:
    """Whether a change is so large that the quadratic says little of its size."""
    return one.relative_change is not None and one.relative_change > limits.trust


def in_words(forecast: LossForecast, limits: CurvatureLimits) -> str:
    """The sum, which matrix is to blame, how far the number can be trusted, and what it leaves out."""
    worst, whole = ranked(forecast)[0], total(forecast)
    told = [f"{whole:.3g} nats per token predicted (limit {limits.predicted:g})"]
    if whole > 0.0:
        told.append(f"{(worst.predicted or 0.0) / whole:.0%} of it by {worst.name}")
    if whole > limits.holds:
        told.append(f"beyond {limits.holds:g} nats the loss is no longer quadratic")
    far = [one for one in forecast.matrices if is_far(one, limits)]
    if far:
        largest = max(far, key=lambda one: one.relative_change or 0.0)
        told.append(
            f"{len(far)} of {len(forecast.matrices)} matrices moved by more than {limits.trust:.0%} of their norm "
            f"({largest.name} by {largest.relative_change:.0%}), where the quadratic no longer holds: it ranks, its "
            "size says little"
        )
    if forecast.not_covered:
        told.append(_without_factors(forecast))
    return "; ".join(told)


def _in_sum(forecast: LossForecast, limits: CurvatureLimits) -> Measurement:
    value = total(forecast)
    outcome = Outcome.WARN if value > limits.predicted else Outcome.PASS
    return Measurement("curvature", WHOLE, STATISTIC, value, 0.0, limits.predicted, "model", outcome)


def _of_matrix(one: CurvatureReading, limits: CurvatureLimits) -> Measurement:
    """A matrix is reported, not judged: one number for the whole is enough to warn once."""
    if one.reason is not None:
        outcome = Outcome.NOT_MEASURED
        return Measurement("curvature", one.name, STATISTIC, None, 0.0, None, one.family, outcome, one.reason)
    reason = None
    if is_far(one, limits):
        reason = f"it moved by {one.relative_change:.0%} of its norm: the quadratic no longer holds"
    return Measurement("curvature", one.name, STATISTIC, one.predicted, 0.0, None, one.family, Outcome.PASS, reason)


def _nothing(forecast: LossForecast) -> str:
    unread = [one for one in forecast.matrices if one.reason is not None]
    if unread:
        return f"{unread[0].name}: {unread[0].reason}"
    if forecast.not_covered:
        return _without_factors(forecast)
    return "no weight matrix changed"


def _without_factors(forecast: LossForecast) -> str:
    first, *others = forecast.not_covered
    return f"no factors for {first}{f' and {len(others)} more that changed' if others else ', which changed'}"
