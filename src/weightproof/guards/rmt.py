"""RMT guard (T1): Marchenko-Pastur outliers, per family and per matrix, against the baseline.

Outliers above the fitted bulk edge are learned structure: losing them is the sign of damage by
quantization, pruning and re-initialisation; gaining them is normal in learning but suspect after a
pure compression step. Judged per family: |g_f - b_f| <= max(floor_f, ceil(eps_f b_f)) on counts b_f
(before) and g_f (after), at the worst end where a count is known only as an interval. Judged per
matrix: all spikes lost, and the growth ratio (s1' / edge') / (s1 / edge) against margin (1 + deadband).
Nothing here rejects alone but a non-finite statistic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, final

from weightproof.guards.conclude import conclude, edit_kind, unmeasured
from weightproof.guards.limits import (
    DEFAULT,
    FamilyLimits,
    check_choice,
    check_count,
    check_families,
    check_number,
    for_family,
)
from weightproof.types import BulkReading, Measurement, Outcome, Readings, Verdict

COMPRESSION = frozenset({"cast", "quantize", "prune"})
NO_GAIN = COMPRESSION | {"preserving"}

Pair = tuple[BulkReading, BulkReading]


def _tier_epsilon() -> FamilyLimits:
    return {DEFAULT: 0.31, "ffn": 0.31, "expert": 0.31, "attn": 0.31}


@dataclass(frozen=True, slots=True)
class RMTLimits:
    """Limits of the RMT guard.

    Attributes:
        epsilon: Relative change of a family's outlier count; calibrated on benign edits (docs/calibration.md).
        floor: Additive floor of that band: storage in bf16 alone moves a count by 1 (docs/evidence.md E3), and
            a ratio rule on counts near 0 means nothing (docs/evidence.md E7).
        min_vanished: A matrix with at least so many spikes that keeps none is flagged.
        deadband: Growth within 1 +- deadband is noise; invarlock 0.2.0 balanced.
        margin: Growth beyond margin (1 + deadband), or below its inverse, is flagged; invarlock 0.2.0.
        correct: None, `scale` or `clip`: bring s1 / edge back to the growth limit; see
            `guards.corrections` for where that is possible (`clip` under the global null).
    """

    epsilon: FamilyLimits = field(default_factory=_tier_epsilon)
    floor: FamilyLimits = field(default_factory=lambda: {DEFAULT: 2.0})
    min_vanished: int = 2
    deadband: float = 0.10
    margin: float = 1.5
    correct: str | None = None

    def __post_init__(self) -> None:
        """Refuse wrong values: PolicyError names the key."""
        object.__setattr__(self, "epsilon", check_families("epsilon", self.epsilon))
        object.__setattr__(self, "floor", check_families("floor", self.floor))
        check_count("min_vanished", self.min_vanished, low=1)
        check_number("deadband", self.deadband, high=1.0)
        check_number("margin", self.margin, low=1.0)
        check_choice("correct", self.correct, (None, "scale", "clip"))

    @property
    def max_growth(self) -> float:
        """Margin (1 + deadband): the largest growth ratio that is not flagged."""
        return self.margin * (1.0 + self.deadband)

    def band(self, family: str, before: int) -> float:
        """max(floor_f, ceil(eps_f b_f)): how far a family's count may move."""
        # The product is rounded first: .1 * 30 must give 3 and not, by a last bit, 4.
        return max(for_family(self.floor, family), math.ceil(round(for_family(self.epsilon, family) * before, 9)))


@final
class RMT:
    """Outlier counts over the fitted Marchenko-Pastur edge, two-sided and aware of the declared kind."""

    name: ClassVar[str] = "rmt"
    tier: ClassVar[str] = "T1"
    needs: ClassVar[frozenset[str]] = frozenset({"bulks"})
    Limits: ClassVar[type[RMTLimits]] = RMTLimits

    def judge(self, before: Readings, after: Readings, limits: RMTLimits) -> Verdict:
        """Judge every matrix fitted before and after under the same null; see the module's docstring."""
        kind = edit_kind(after)
        names = list(dict.fromkeys([*before.bulks, *after.bulks]))
        measurements: list[Measurement] = []
        pairs: list[Pair] = []
        for name in names:
            old, new = before.bulks.get(name), after.bulks.get(name)
            gap = _unreadable(name, old, new, training=kind == "train")
            if gap is not None or old is None or new is None:
                measurements.append(gap or _gap(name, "other", "not read"))
            elif broken := _nonfinite(new):
                measurements.append(broken)
            else:
                pairs.append((old, new))
        for pair in pairs:
            measurements += _judge_matrix(pair, kind, limits)
        for family in dict.fromkeys(old.family for old, _ in pairs):
            members = [pair for pair in pairs if pair[0].family == family]
            measurements += _judge_family(family, members, kind, limits)
        nothing = unmeasured(after, "bulks", "no Marchenko-Pastur fit exists both before and after the change")
        return conclude(self.name, measurements, coverage=(len(pairs), len(names)), nothing=nothing)


def _gap(name: str, family: str, reason: str, outcome: Outcome = Outcome.NOT_MEASURED) -> Measurement:
    return Measurement("rmt", name, "num_spikes", None, None, None, family, outcome, reason)


def _unreadable(name: str, old: BulkReading | None, new: BulkReading | None, *, training: bool) -> Measurement | None:
    """Why a matrix cannot be compared; WARN when it could be fitted before and cannot now."""
    if old is None or new is None:
        known = old or new
        side = "before" if old is None else "after"
        return _gap(name, known.family if known else "other", f"there is no fit {side} the change")
    if old.num_spikes is None:
        return _gap(name, old.family, f"no fit before the change: {old.reason or 'no reason was given'}")
    if new.num_spikes is None:
        outcome = Outcome.NOT_MEASURED if training else Outcome.WARN
        return _gap(name, old.family, f"no fit after the change: {new.reason or 'no reason was given'}", outcome)
    if old.null != new.null:
        return _gap(name, old.family, f"fitted under {old.null!r} before and {new.null!r} after the change")
    return None


_BOUNDED = "its number of spikes is bounded from the spectrum before, which gives no such value (Weyl's inequality)"


def _nonfinite(new: BulkReading) -> Measurement | None:
    values = (new.sigma_mp, new.edge_plus, new.spike_energy, new.ks_distance, new.top_over_edge)
    count = sum(value is not None and not math.isfinite(value) for value in values)
    if not count:
        return None
    return Measurement("rmt", new.name, "num_nonfinite_statistics", count, 0.0, 0.0, new.family, Outcome.FAIL)


def _judge_matrix(pair: Pair, kind: str, limits: RMTLimits) -> Iterator[Measurement]:
    old, new = pair
    base = Measurement("rmt", old.name, "", None, None, None, old.family)
    for statistic in ("sigma_mp", "edge_plus", "spike_energy", "ks_distance"):
        value, reference = getattr(new, statistic), getattr(old, statistic)
        reason = new.reason or _BOUNDED if value is None else None
        yield replace(base, statistic=statistic, value=value, reference=reference, reason=reason)
    yield from _judge_growth(base, pair, kind, limits)
    had, left = counts(old)[0], counts(new)[0]
    vanished = had >= limits.min_vanished and left == 0 and kind != "train"
    yield replace(
        base,
        statistic="num_spikes",
        value=new.num_spikes,
        reference=old.num_spikes,
        limit=1.0 if vanished else None,
        outcome=Outcome.WARN if vanished else Outcome.PASS,
        reason=f"all {had} outliers are gone" if vanished else None,
    )


def _judge_growth(base: Measurement, pair: Pair, kind: str, limits: RMTLimits) -> Iterator[Measurement]:
    """Log of the growth ratio, so that growth and shrinkage weigh the same."""
    growth = growth_of(pair)
    if growth is None:
        return
    limit = math.log(limits.max_growth)
    up, down = growth > limits.max_growth, growth < 1.0 / limits.max_growth
    flagged = kind != "train" and (down or (up and kind in NO_GAIN))
    judged = kind != "train" and (flagged or not up)
    yield replace(
        base,
        statistic="log_growth_ratio",
        value=math.log(growth) if growth > 0 else -math.inf,
        reference=pair[0].top_over_edge,
        limit=limit if judged else None,
        outcome=Outcome.WARN if flagged else Outcome.PASS,
    )


def growth_of(pair: Pair) -> float | None:
    """(s1' / edge') / (s1 / edge); None where a baseline ratio is missing or zero."""
    then, now = pair[0].top_over_edge, pair[1].top_over_edge
    return None if not then or now is None else now / then


def counts(reading: BulkReading) -> tuple[int, int]:
    """The interval of a spike count; both ends equal the count where it is exact."""
    count = reading.num_spikes or 0
    low = count if reading.num_spikes_low is None else reading.num_spikes_low
    high = count if reading.num_spikes_high is None else reading.num_spikes_high
    return min(low, count), max(high, count)


def _judge_family(family: str, members: Sequence[Pair], kind: str, limits: RMTLimits) -> Iterator[Measurement]:
    """Loss and gain of outliers summed over a family, each at its worst end, within one band."""
    before = sum(old.num_spikes or 0 for old, _ in members)
    after = sum(new.num_spikes or 0 for _, new in members)
    lost = max(sum(counts(old)[1] for old, _ in members) - sum(counts(new)[0] for _, new in members), 0)
    gained = max(sum(counts(new)[1] for _, new in members) - sum(counts(old)[0] for old, _ in members), 0)
    band = limits.band(family, before)
    base = Measurement("rmt", f"family {family}", "", None, before, None, family)
    exact = all(counts(reading)[0] == counts(reading)[1] for pair in members for reading in pair)
    note = None if exact else f"{before} before and {after} after, counted as an interval, judged at its worst end"
    for statistic, value, is_judged in (
        ("num_spikes_lost", lost, kind != "train"),
        ("num_spikes_gained", gained, kind in NO_GAIN),
    ):
        breach = is_judged and value > band
        yield replace(
            base,
            statistic=statistic,
            value=float(value),
            limit=float(band) if is_judged else None,
            outcome=Outcome.WARN if breach else Outcome.PASS,
            reason=note if is_judged else None,
        )
