"""Variance guard (T2): the second moment of each block's attention and MLP output, against the baseline.

Judged per (windows, tap): log(v' / v) within a band; beyond the gross band, NaN or a vanished output
is FAIL. In a window of training only finiteness and vanished outputs are judged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, final

from weightproof.errors import PolicyError
from weightproof.guards.conclude import conclude, edit_kind, unmeasured
from weightproof.guards.limits import check_count, check_number
from weightproof.types import Measurement, Outcome, Readings, Verdict


@dataclass(frozen=True, slots=True)
class VarianceLimits:
    """Limits of the variance guard.

    Attributes:
        band: |log(v'/v)|, calibrated on benign edits (docs/calibration.md).
        gross_band: FAIL beyond this; a factor 10, as for a single matrix's top singular value.
        equalise: Whether edits are corrected by variance equalisation (see
            `weightproof.transactions.equalisation`); off.
        max_equalised: Sub-layers scaled at most, those furthest off.
        equalise_min_scale: Least scale.
        equalise_max_scale: Largest scale; a gain in size is trusted less than a loss.
        equalise_deadband: Scales nearer to 1 are left at 1.
        equalise_min_effect: Gain in nats per token that the interval must show as a whole: invarlock asks a
            perplexity of 100 to drop by .05.
    """

    band: float = 0.78
    gross_band: float = 2.303
    equalise: bool = False
    max_equalised: int = 8
    equalise_min_scale: float = 0.85
    equalise_max_scale: float = 1.12
    equalise_deadband: float = 0.02
    equalise_min_effect: float = 0.0005

    def __post_init__(self) -> None:
        """Refuse wrong values: PolicyError names the key."""
        check_number("band", self.band)
        check_number("gross_band", self.gross_band)
        if self.gross_band < self.band:
            raise PolicyError(f"limit 'gross_band' ({self.gross_band!r}) must not be below 'band' ({self.band!r})")
        if not isinstance(self.equalise, bool):
            raise PolicyError(f"limit 'equalise' must be true or false, not {self.equalise!r}")
        check_count("max_equalised", self.max_equalised, low=1)
        check_number("equalise_min_scale", self.equalise_min_scale, high=1.0, strict=True)
        check_number("equalise_max_scale", self.equalise_max_scale, low=1.0)
        check_number("equalise_deadband", self.equalise_deadband, high=1.0)
        check_number("equalise_min_effect", self.equalise_min_effect)


@final
class Variance:
    """Second moments of block outputs on the same windows, before and after."""

    name: ClassVar[str] = "variance"
    tier: ClassVar[str] = "T2"
    needs: ClassVar[frozenset[str]] = frozenset({"second_moments"})
    Limits: ClassVar[type[VarianceLimits]] = VarianceLimits

    def judge(self, before: Readings, after: Readings, limits: VarianceLimits) -> Verdict:
        """Judge every tap read before and after."""
        training = edit_kind(after) == "train"
        names = list(dict.fromkeys([*before.second_moments, *after.second_moments]))
        measurements = [
            _judge_tap(name, before.second_moments.get(name), after.second_moments.get(name), limits) for name in names
        ]
        if training:
            measurements = [_report(item) for item in measurements]
        measured = sum(item.outcome is not Outcome.NOT_MEASURED for item in measurements)
        nothing = unmeasured(after, "second_moments", "no block output could be read both before and after the change")
        return conclude(self.name, measurements, coverage=(measured, len(names)), nothing=nothing)


def _judge_tap(name: str, then: float | None, now: float | None, limits: VarianceLimits) -> Measurement:
    base = Measurement("variance", name, "log_second_moment_ratio", None, then, limits.band)
    if now is not None and not math.isfinite(now):
        return replace(base, statistic="second_moment", value=now, outcome=Outcome.FAIL, reason="it is not finite")
    if then is None or now is None:
        side = "before" if then is None else "after"
        reason = f"there is no reading {side} the change"
        return replace(base, limit=None, outcome=Outcome.NOT_MEASURED, reason=reason)
    if not math.isfinite(then) or then <= 0.0:
        reason = f"the baseline is {then:g}, so there is no ratio"
        return replace(base, limit=None, outcome=Outcome.NOT_MEASURED, reason=reason)
    if now <= 0.0:
        vanished = replace(base, statistic="second_moment", value=now, limit=0.0)
        return replace(vanished, outcome=Outcome.FAIL, reason="the output vanished")
    value = math.log(now) - math.log(then)
    if abs(value) > limits.gross_band:
        return replace(base, value=value, limit=limits.gross_band, outcome=Outcome.FAIL)
    return replace(base, value=value, outcome=Outcome.WARN if abs(value) > limits.band else Outcome.PASS)


def _report(item: Measurement) -> Measurement:
    """In training outputs are meant to move: only what is not finite or vanished stays judged."""
    if item.statistic == "second_moment" or item.outcome is Outcome.NOT_MEASURED:
        return item
    return replace(item, limit=None, outcome=Outcome.PASS)
