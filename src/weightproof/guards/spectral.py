"""Spectral guard (T1): each matrix against its own baseline, two-sided, never against other layers.

Judged per matrix, as logarithms so that growth and shrinkage weigh the same:

- log(s1' / s1), with the interval that `spectral_norm_error` leaves;
- log of the stable-rank ratio, stable rank = (||W||_F / s1)^2, with the same interval;
- log of the ratio of norm collapse, min(row_min / row_median, col_min / col_median);
- new zero rows and columns.

A deviation beyond the family's limit (kappa) that Benjamini-Hochberg over every tested statistic also
rejects is WARN. Gross change is FAIL. A statistic known only as an interval is judged at its worst end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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
from weightproof.guards.multiple_testing import benjamini_hochberg, exponential_tail_p
from weightproof.types import MatrixReading, Measurement, Outcome, Readings, Verdict

GROWTH = "log_spectral_norm_ratio"
STABLE_RANK = "log_stable_rank_ratio"
COLLAPSE = "log_norm_collapse_ratio"
# Width in log units from which an interval is told beside its value: what a value shows in two digits.
COARSE = 0.01


def _by_family(default: float, attn: float, ffn: float) -> FamilyLimits:
    return {DEFAULT: default, "attn": attn, "ffn": ffn}


@dataclass(frozen=True, slots=True)
class SpectralLimits:
    """Limits of the spectral guard; family limits are mappings with a `default`.

    Attributes:
        kappa: |log(s1'/s1)|, calibrated on benign edits (docs/calibration.md).
        kappa_stable_rank: |log stable-rank ratio|: twice kappa and the largest change of the Frobenius norm.
        kappa_collapse: |log norm-collapse ratio|, calibrated as kappa (invarlock 0.12.1 warns at 1.386).
        max_new_zero_rows: Rows (or columns) that may become zero; int8 per channel makes none.
        alpha: False discovery rate of Benjamini-Hochberg over all tested statistics.
        null_form: Shape of the fitted null tail; only `exponential` exists.
        null_n: Number of matrices, changed by benign edits, that the null scales were fitted on.
        null_scale: Scale of |log(s1'/s1)| under benign edits: kappa / ln null_n, so that a value at its limit is
            one in all of them (docs/calibration.md).
        null_scale_stable_rank: The same for the stable rank.
        null_scale_collapse: The same for norm collapse.
        gross_growth: s1 ratio outside [1/g, g] is FAIL (docs/guards/spectral.md).
        gross_stable_rank: stable-rank ratio below this is FAIL (docs/guards/spectral.md; invarlock 0.12.1 fatal).
        gross_collapse: collapse ratio below this is FAIL (docs/guards/spectral.md; invarlock 0.12.1 fatal).
        correct: None, `scale` or `clip`: bring s1 back to kappa through the snapshot, then judge again.
    """

    kappa: FamilyLimits = field(default_factory=lambda: _by_family(0.15, 0.15, 0.15))
    kappa_stable_rank: FamilyLimits = field(default_factory=lambda: _by_family(0.68, 0.68, 0.65))
    kappa_collapse: FamilyLimits = field(default_factory=lambda: _by_family(0.58, 0.48, 0.58))
    max_new_zero_rows: int = 0
    alpha: float = 0.05
    null_form: str = "exponential"
    null_n: int = 5743
    null_scale: FamilyLimits = field(default_factory=lambda: _by_family(0.018, 0.018, 0.018))
    null_scale_stable_rank: FamilyLimits = field(default_factory=lambda: _by_family(0.079, 0.079, 0.076))
    null_scale_collapse: FamilyLimits = field(default_factory=lambda: _by_family(0.068, 0.056, 0.068))
    gross_growth: float = 10.0
    gross_stable_rank: float = 0.25
    gross_collapse: float = 0.10
    correct: str | None = None

    def __post_init__(self) -> None:
        """Refuse wrong values: PolicyError names the key."""
        for key in ("kappa", "kappa_stable_rank", "kappa_collapse"):
            object.__setattr__(self, key, check_families(key, getattr(self, key)))
        for key in ("null_scale", "null_scale_stable_rank", "null_scale_collapse"):
            object.__setattr__(self, key, check_families(key, getattr(self, key), strict=True))
        check_count("max_new_zero_rows", self.max_new_zero_rows)
        check_count("null_n", self.null_n, low=1)
        check_number("alpha", self.alpha, high=1.0, strict=True)
        check_number("gross_growth", self.gross_growth, low=1.0, strict=True)
        check_number("gross_stable_rank", self.gross_stable_rank, high=1.0)
        check_number("gross_collapse", self.gross_collapse, high=1.0)
        check_choice("null_form", self.null_form, ("exponential",))
        check_choice("correct", self.correct, (None, "scale", "clip"))


@dataclass(frozen=True, slots=True)
class Deviation:
    """One statistic of one matrix: log ratio to baseline, known to lie within [low, high]."""

    name: str
    family: str
    statistic: str
    value: float
    low: float
    high: float
    reference: float
    kappa: float
    scale: float
    gross_low: float
    gross_high: float = math.inf

    @property
    def worst(self) -> float:
        """Largest size that the interval admits."""
        return max(abs(self.low), abs(self.high))

    def is_proven(self, limit: float) -> bool:
        """Whether the whole interval lies beyond +-limit."""
        return self.low > limit or self.high < -limit

    @property
    def gross_limit(self) -> float | None:
        """The gross limit that the worst end breaks, None when it breaks none."""
        if self.low < self.gross_low:
            return self.gross_low
        return self.gross_high if self.high > self.gross_high else None


@final
class Spectral:
    """Top singular value, stable rank and norm collapse of every matrix against its own baseline."""

    name: ClassVar[str] = "spectral"
    tier: ClassVar[str] = "T1"
    needs: ClassVar[frozenset[str]] = frozenset({"matrices"})
    Limits: ClassVar[type[SpectralLimits]] = SpectralLimits

    def judge(self, before: Readings, after: Readings, limits: SpectralLimits) -> Verdict:
        """Judge every matrix read before and after; see the module's docstring."""
        training = edit_kind(after) == "train"
        names = list(dict.fromkeys([*before.matrices, *after.matrices]))
        measurements: list[Measurement] = []
        deviations: list[Deviation] = []
        measured = 0
        for name in names:
            old, new = before.matrices.get(name), after.matrices.get(name)
            gap = _unreadable(name, old, new, training=training)
            if gap is not None or old is None or new is None:
                measurements.append(gap or _gap(name, "other", "not read"))
                continue
            measured += 1
            broken = list(_judge_exactly(old, new, after, limits))
            measurements += broken
            if not any(item.statistic in {"num_nonfinite_statistics", "became_zero"} for item in broken):
                deviations += deviations_of(old, new, limits)
        judge_deviations = _report_training if training else _judge_deviations
        measurements += judge_deviations(deviations, after, limits)
        nothing = unmeasured(after, "matrices", "no weight matrix could be measured both before and after")
        return conclude(self.name, measurements, coverage=(measured, len(names)), nothing=nothing)


def _gap(name: str, family: str, reason: str, outcome: Outcome = Outcome.NOT_MEASURED) -> Measurement:
    return Measurement("spectral", name, "spectral_norm", None, None, None, family, outcome, reason)


def _unreadable(
    name: str, old: MatrixReading | None, new: MatrixReading | None, *, training: bool
) -> Measurement | None:
    """Why a matrix cannot be judged; WARN when it could be read before and cannot now."""
    if old is None or new is None:
        side = "before" if old is None else "after"
        known = old or new
        return _gap(name, known.family if known else "other", f"there is no reading {side} the change")
    for side, reading in (("before", old), ("after", new)):
        if reading.spectral_norm is None or reading.spectral_norm_error is None or reading.frobenius_norm is None:
            lost = side == "after" and not training
            reason = f"not measured {side} the change: {reading.reason or 'no reason was given'}"
            return _gap(name, old.family, reason, Outcome.WARN if lost else Outcome.NOT_MEASURED)
    if not _is_finite(old):
        return _gap(name, old.family, "the baseline itself is not finite")
    return None


def _is_finite(reading: MatrixReading) -> bool:
    values = (reading.frobenius_norm, reading.spectral_norm, reading.spectral_norm_error, reading.norm_collapse)
    return all(value is None or math.isfinite(value) for value in values)


def _loss_alarm(after: Readings) -> bool:
    return bool(after.loss_spike) or any(not math.isfinite(loss) for loss in after.raw_losses or ())


def _judge_exactly(
    old: MatrixReading, new: MatrixReading, after: Readings, limits: SpectralLimits
) -> Iterator[Measurement]:
    """What needs no interval: finite statistics, a matrix that became zero, new zero rows and columns."""
    training = edit_kind(after) == "train"
    base = Measurement("spectral", new.name, "", None, None, None, old.family)
    if not _is_finite(new):
        yield replace(
            base, statistic="num_nonfinite_statistics", value=1.0, reference=0.0, limit=0.0, outcome=Outcome.FAIL
        )
        return
    if old.frobenius_norm and not new.frobenius_norm:
        counts = not training or old.name not in after.untrained or _loss_alarm(after)
        outcome, limit = (Outcome.FAIL, 0.0) if counts else (Outcome.PASS, None)
        reason = "every element of the matrix is zero now"
        yield replace(
            base, statistic="became_zero", value=1.0, reference=0.0, limit=limit, outcome=outcome, reason=reason
        )
        return
    if not old.frobenius_norm:
        grown = bool(new.frobenius_norm) and not training
        yield replace(
            base,
            statistic="frobenius_norm",
            value=new.frobenius_norm,
            reference=0.0,
            limit=0.0 if grown else None,
            outcome=Outcome.WARN if grown else Outcome.PASS,
            reason="the matrix was zero at baseline, so ratios are undefined",
        )
    yield from _zero_lines(base, (old, new), limits, training=training)


def _zero_lines(
    base: Measurement, pair: tuple[MatrixReading, MatrixReading], limits: SpectralLimits, *, training: bool
) -> Iterator[Measurement]:
    for statistic in ("zero_rows", "zero_cols"):
        then, now = (getattr(reading, statistic) for reading in pair)
        if then is None or now is None:
            continue
        limit = float(limits.max_new_zero_rows)
        breach = now - then > limit and not training
        yield replace(
            base,
            statistic=f"new_{statistic}",
            value=float(max(now - then, 0)),
            reference=float(then),
            limit=None if training else limit,
            outcome=Outcome.WARN if breach else Outcome.PASS,
        )


def deviations_of(old: MatrixReading, new: MatrixReading, limits: SpectralLimits) -> Iterator[Deviation]:
    """Log ratios of one matrix with the interval that the errors of both readings leave."""
    if not old.spectral_norm or not new.frobenius_norm or not old.frobenius_norm:
        return
    value = _log_ratio(new.spectral_norm or 0.0, old.spectral_norm)
    low = _log_ratio(_below(new), _above(old))
    high = _log_ratio(_above(new), _below(old))
    family = old.family
    gross = math.log(limits.gross_growth)
    yield Deviation(
        old.name,
        family,
        GROWTH,
        value,
        low,
        high,
        reference=old.spectral_norm,
        kappa=for_family(limits.kappa, family),
        scale=for_family(limits.null_scale, family),
        gross_low=-gross,
        gross_high=gross,
    )
    growth = _log_ratio(new.frobenius_norm, old.frobenius_norm)
    yield Deviation(
        old.name,
        family,
        STABLE_RANK,
        2 * (growth - value),
        2 * (growth - high),
        2 * (growth - low),
        reference=old.stable_rank or math.nan,
        kappa=for_family(limits.kappa_stable_rank, family),
        scale=for_family(limits.null_scale_stable_rank, family),
        gross_low=_log_ratio(limits.gross_stable_rank, 1.0),
    )
    if old.norm_collapse and new.norm_collapse is not None:
        change = _log_ratio(new.norm_collapse, old.norm_collapse)
        yield Deviation(
            old.name,
            family,
            COLLAPSE,
            change,
            change,
            change,
            reference=old.norm_collapse,
            kappa=for_family(limits.kappa_collapse, family),
            scale=for_family(limits.null_scale_collapse, family),
            gross_low=_log_ratio(limits.gross_collapse, 1.0),
        )


def _below(reading: MatrixReading) -> float:
    """Lower end of s1: what its error leaves, or ||W||_F / sqrt(k), k the smaller side, if that is more."""
    value, frobenius = reading.spectral_norm or 0.0, reading.frobenius_norm or 0.0
    flat = frobenius / math.sqrt(max(min(reading.d_out, reading.d_in), 1))
    return max(value - (reading.spectral_norm_error or 0.0), min(flat, value))


def _above(reading: MatrixReading) -> float:
    """Upper end of s1: what its error leaves, or ||W||_F if that is less."""
    value, frobenius = reading.spectral_norm or 0.0, reading.frobenius_norm or 0.0
    return min(value + (reading.spectral_norm_error or 0.0), max(frobenius, value))


def _log_ratio(now: float, then: float) -> float:
    if now == then:
        return 0.0
    if now == 0.0 or then == 0.0:
        return -math.inf if now == 0.0 else math.inf
    return math.log(now) - math.log(then)


def _judge_deviations(deviations: list[Deviation], after: Readings, limits: SpectralLimits) -> Iterator[Measurement]:
    """Gross change is FAIL; beyond kappa and rejected by Benjamini-Hochberg over all tests is WARN."""
    p_values = [exponential_tail_p(item.worst, item.scale) for item in deviations]
    rejected = benjamini_hochberg(p_values, limits.alpha)
    for item, is_rejected in zip(deviations, rejected, strict=True):
        limit, outcome = item.kappa, Outcome.PASS
        if item.gross_limit is not None:
            limit, outcome = item.gross_limit, Outcome.FAIL
        elif item.worst > item.kappa and is_rejected:
            outcome = Outcome.WARN
        yield _measure(item, limit, outcome)


def _report_training(deviations: list[Deviation], after: Readings, limits: SpectralLimits) -> Iterator[Measurement]:
    """In a window of training only gross growth counts, and only where a trained baseline exists.

    With a loss alarm gross shrinkage counts too: weights set to zero have moved on by the next check.
    """
    alarm = _loss_alarm(after)
    for item in deviations:
        counts = alarm or not (after.in_warmup or item.name in after.untrained)
        if item.statistic != GROWTH or not counts:
            yield _measure(item, None, Outcome.PASS)
            continue
        shrunk = alarm and item.low < item.gross_low
        outcome = Outcome.FAIL if shrunk or item.high > item.gross_high else Outcome.PASS
        yield _measure(item, item.gross_low if shrunk else item.gross_high, outcome)


def _measure(item: Deviation, limit: float | None, outcome: Outcome) -> Measurement:
    reason = None
    if limit is not None and outcome is not Outcome.PASS and not item.is_proven(abs(limit)):
        reason = f"known only to lie in [{item.low:.4g}, {item.high:.4g}], so judged at its worst end"
    elif limit is not None and item.worst > abs(limit) and outcome is Outcome.PASS:
        reason = f"beyond the limit but not rejected at a false discovery rate over all {item.statistic} tests"
    elif item.high - item.low > COARSE:
        # The ladder stops as soon as the limits are decided: the value is the middle of what is known then.
        reason = f"known to lie in [{item.low:.4g}, {item.high:.4g}]"
    return Measurement(
        "spectral", item.name, item.statistic, item.value, item.reference, limit, item.family, outcome, reason
    )
