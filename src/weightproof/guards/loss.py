"""Loss guard (T3): paired losses on the same windows before and after a change.

Retain windows must not get worse by more than a limit, target windows must get better. The interval decides, never
the point: PASS accepts, FAIL rejects, WARN is undecided. This is the only guard that may accept a change by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, final

from weightproof.errors import PolicyError
from weightproof.guards.conclude import unmeasured
from weightproof.guards.limits import DEFAULT, check_count, check_number
from weightproof.types import LossReading, Measurement, Outcome, Readings, Verdict

# Ends of an interval within this of the limit are at it: rounding, not evidence.
_ROUNDING = 1e-12
_MOST_WINDOWS_TO_ADVISE = 100_000_000


@dataclass(frozen=True, slots=True)
class LossLimits:
    """Limits of the loss guard, and how much data it reads (docs/guards/loss.md).

    Attributes:
        tau: Largest perplexity ratio after / before on retain windows; log tau in nats per token, or per example
            of a classifier.
        metric_drop: Largest loss of a metric such as accuracy on retain windows, in its own units; by metric name.
        min_gain: Gain that a target set must show, in the units of its metric; 0: any gain above 0.
        alpha: Two-sided error of the interval; a wrong acceptance has half of it.
        min_windows: Coverage floor: fewer windows are NOT_MEASURED. No test accepts before it has read as many.
        min_tokens: The same in scored tokens, where a window has many.
        min_effective_size: Below this Kish size of the groups' weights no interval is trusted; stopping early needs
            `paired.MIN_SEQUENTIAL_SIZE` besides.
        max_windows: Windows read at most, the first of the data.
        length: Tokens per window, cut to the model's position table as well.
    """

    tau: float = 1.05
    metric_drop: Mapping[str, float] = field(default_factory=lambda: {DEFAULT: 0.01})
    min_gain: float = 0.0
    alpha: float = 0.05
    min_windows: int = 100
    min_tokens: int = 4096
    min_effective_size: float = 16.0
    max_windows: int = 512
    length: int = 512

    def __post_init__(self) -> None:
        """Refuse wrong values: PolicyError names the key."""
        check_number("tau", self.tau, low=1.0)
        check_number("min_gain", self.min_gain)
        check_number("alpha", self.alpha, low=0.001, high=0.5)
        check_number("min_effective_size", self.min_effective_size, low=2.0)
        for key in ("min_windows", "max_windows", "length"):
            check_count(key, getattr(self, key), low=1)
        check_count("min_tokens", self.min_tokens)
        if self.max_windows < self.min_windows:
            raise PolicyError(
                f"limit 'max_windows' ({self.max_windows}) must not be below 'min_windows' ({self.min_windows})"
            )
        object.__setattr__(self, "metric_drop", _by_metric(self.metric_drop))

    def largest_harm(self, role: str, metric: str) -> float:
        """How much worse a metric may be after the change, counted so that more is worse; -gain for a target."""
        if role == "target":
            return -self.min_gain
        return math.log(self.tau) if metric == "nll" else self.metric_drop.get(metric, self.metric_drop[DEFAULT])

    def too_little(self, num_windows: int, num_tokens: int) -> str | None:
        """Why this much data is below the coverage floor; None where it is not."""
        if num_windows < self.min_windows:
            return f"{num_windows} windows of at least {self.min_windows}"
        if num_tokens > num_windows and num_tokens < self.min_tokens:  # equal: one score an example
            return f"{num_tokens} scored tokens of at least {self.min_tokens}"
        return None

    def outcome(self, reading: LossReading) -> Outcome:
        """PASS accepts, FAIL rejects, WARN is undecided, NOT_MEASURED says so."""
        unread = reading.reason is not None or self.too_little(reading.num_windows, reading.num_tokens) is not None
        if unread or not _is_finite(reading.before):
            return Outcome.NOT_MEASURED
        if not _is_finite(reading.after):
            return Outcome.FAIL
        ends = harm(reading)
        if reading.undecided is not None or ends is None or not all(map(_is_finite, ends)):
            return Outcome.WARN
        return self._decided(reading, *ends)

    def _decided(self, reading: LossReading, low: float, high: float) -> Outcome:
        most = self.largest_harm(reading.role, reading.metric)
        accepts, rejects = high <= most + _ROUNDING, low > most + _ROUNDING
        if reading.role == "target":  # no change is no gain
            accepts, rejects = accepts and high < -_ROUNDING, rejects or low >= -_ROUNDING
        return Outcome.PASS if accepts else Outcome.FAIL if rejects else Outcome.WARN


def harm(reading: LossReading) -> tuple[float, float] | None:
    """The interval of the change, turned so that more is worse; None where there is none."""
    if reading.lower is None or reading.upper is None:
        return None
    if reading.sums.get("higher_is_better"):
        return -reading.upper, -reading.lower
    return reading.lower, reading.upper


@final
class Loss:
    """Paired losses of retain and target windows."""

    name: ClassVar[str] = "loss"
    tier: ClassVar[str] = "T3"
    needs: ClassVar[frozenset[str]] = frozenset({"losses"})
    Limits: ClassVar[type[LossLimits]] = LossLimits

    def judge(self, before: Readings, after: Readings, limits: LossLimits) -> Verdict:
        """Judge every loss reading of `after`, which is paired in itself; `before` is not used.

        Rejects if any reading rejects, accepts only if all accept. What could not be measured beside something
        that could is undecided, and so is a gain on a target set alone: it says nothing of what was lost elsewhere.
        """
        readings = after.losses
        if not readings:
            nothing = unmeasured(after, "losses", "there is no loss data")
            return Verdict(self.name, Outcome.NOT_MEASURED, (), nothing, 0, 0)
        outcomes = [limits.outcome(reading) for reading in readings]
        measured = sum(outcome is not Outcome.NOT_MEASURED for outcome in outcomes)
        measurements = tuple(
            item
            for reading, outcome in zip(readings, outcomes, strict=True)
            for item in _measurements(reading, outcome, limits)
        )
        sentences = [_sentence(reading, outcome, limits) for reading, outcome in zip(readings, outcomes, strict=True)]
        overall = _overall(outcomes)
        if overall is Outcome.PASS and all(reading.role != "retain" for reading in readings):
            reason = f"{'; '.join(sentences)}; no retain data say that nothing was lost elsewhere: give retain="
            return Verdict(self.name, Outcome.WARN, measurements, reason, measured, len(readings))
        telling = [
            text
            for text, outcome in zip(sentences, outcomes, strict=True)
            if overall is Outcome.PASS
            or outcome is overall
            or (overall is Outcome.WARN and outcome is not Outcome.PASS)
        ]
        return Verdict(self.name, overall, measurements, "; ".join(telling), measured, len(readings))


def _overall(outcomes: Sequence[Outcome]) -> Outcome:
    if Outcome.FAIL in outcomes:
        return Outcome.FAIL
    if all(outcome is Outcome.NOT_MEASURED for outcome in outcomes):
        return Outcome.NOT_MEASURED
    return Outcome.PASS if all(outcome is Outcome.PASS for outcome in outcomes) else Outcome.WARN


def _measurements(reading: LossReading, outcome: Outcome, limits: LossLimits) -> list[Measurement]:
    """The end of the interval that decided, judged; the point and the means beside it, reported."""
    name = f"{reading.role} {reading.metric}"
    most = limits.largest_harm(reading.role, reading.metric)
    base = Measurement("loss", name, "harm_upper_bound", None, None, most, outcome=outcome)
    if outcome is Outcome.NOT_MEASURED:
        return [replace(base, limit=None, reason=_why_unmeasured(reading, limits))]
    ends = harm(reading)
    if not _is_finite(reading.after):
        judged = replace(base, statistic="after", value=reading.after, reference=reading.before, limit=None)
        return [replace(judged, reason=_why_not_finite(reading))]
    value = None if ends is None else ends[0] if outcome is Outcome.FAIL else ends[1]
    statistic = "harm_lower_bound" if outcome is Outcome.FAIL else "harm_upper_bound"
    judged = replace(base, statistic=statistic, value=value, reason=_advice(reading, outcome, limits))
    shown = [Measurement("loss", name, "difference", reading.difference, None, None)]
    shown += [Measurement("loss", name, "mean", reading.after, reading.before, None)]
    return [judged, *shown]


def _sentence(reading: LossReading, outcome: Outcome, limits: LossLimits) -> str:
    name = f"{reading.role} {reading.metric}"
    if outcome is Outcome.NOT_MEASURED:
        return f"{name} was not measured: {_why_unmeasured(reading, limits)}"
    if not _is_finite(reading.after):
        return (
            f"{name} is {reading.after} after the change and was {_number(reading.before)}: {_why_not_finite(reading)}"
        )
    ends = harm(reading)
    most = limits.largest_harm(reading.role, reading.metric)
    percent = f"{100 * (reading.confidence or 0.0):g} %"
    between = "no interval" if ends is None else f"{percent} interval [{ends[0]:.4g}, {ends[1]:.4g}]"
    unit = "nats per token" if reading.metric == "nll" and reading.num_tokens > reading.num_windows else "an example"
    verb = {Outcome.PASS: "accepts", Outcome.FAIL: "rejects", Outcome.WARN: "cannot decide"}[outcome]
    asked = (
        f"at most {most:.4g} is allowed" if reading.role == "retain" else f"a gain above {limits.min_gain:.4g} is asked"
    )
    size = f"{reading.num_used} of {reading.num_groups} groups"
    text = f"{name} {verb}: worse by {between} {unit} ({asked}, {size}, {reading.method})"
    advice = _advice(reading, outcome, limits)
    return f"{text}; {advice}" if advice else text


def _why_unmeasured(reading: LossReading, limits: LossLimits) -> str:
    if reading.reason is not None:
        return reading.reason
    floor = limits.too_little(reading.num_windows, reading.num_tokens)
    return floor if floor is not None else f"the loss before the change is {reading.before}"


def _why_not_finite(reading: LossReading) -> str:
    return reading.method if reading.method.startswith("the model") else "the same windows gave numbers before"


def _advice(reading: LossReading, outcome: Outcome, limits: LossLimits) -> str | None:
    """Why it is undecided, and how many windows more might decide (widths shrink as 1 / sqrt n)."""
    if outcome is not Outcome.WARN:
        return None
    if reading.undecided is not None:
        return reading.undecided
    ends = harm(reading)
    if ends is None or not all(map(_is_finite, ends)):
        return "there is no interval"
    half, middle = (ends[1] - ends[0]) / 2, (ends[1] + ends[0]) / 2
    gap = abs(middle - limits.largest_harm(reading.role, reading.metric))
    needed = reading.num_windows * (half / gap) ** 2 if gap > 0 else math.inf
    if needed > _MOST_WINDOWS_TO_ADVISE:
        return "the change lies at the limit: more windows would hardly decide"
    more = max(1, math.ceil(round(needed, 6)) - reading.num_windows)
    return f"about {more} windows more might decide"


def _by_metric(value: object) -> dict[str, float]:
    if not isinstance(value, Mapping):
        return {DEFAULT: check_number("metric_drop", value)}
    if DEFAULT not in value:
        raise PolicyError(f"limit 'metric_drop' gives no {DEFAULT!r} for the metrics that it does not name")
    return {str(metric): check_number(f"metric_drop.{metric}", item) for metric, item in value.items()}


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"
