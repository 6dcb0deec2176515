"""Divergence guard (T2): KL(base || now) of the outputs, in nats per token, on each set of windows.

Where a model has no logits the relative RMS change of its normalised last hidden state is judged
instead. Above the limit is FAIL, above a fraction of it WARN; a non-finite output is FAIL. On FAIL
the first and the worst block are named. In a window of training outputs are meant to move: the
numbers are reported and only finiteness is judged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

from weightproof.guards.conclude import conclude, edit_kind, unmeasured
from weightproof.guards.limits import check_number
from weightproof.types import DivergenceReading, Measurement, Outcome, Readings, Verdict

# A block counts as damaged from a tenth of the worst block's error: the others carry only rounding.
DAMAGED_FROM = 0.1


@dataclass(frozen=True, slots=True)
class DivergenceLimits:
    """Limits of the divergence guard.

    Attributes:
        kl: Nats per token, calibrated on benign edits (docs/calibration.md). docs/evidence.md E4: on five briefly
            trained models every harmful edit gave at least .057 on random tokens.
        hidden_error: For models without logits; .15 is what a KL of .041 means for logits of standard
            deviation 2 (KL is about (h s)^2 / 2).
        warn_fraction: Share of a limit above which it is WARN (docs/guards/divergence.md: half of it).
    """

    kl: float = 0.041
    hidden_error: float = 0.15
    warn_fraction: float = 0.5

    def __post_init__(self) -> None:
        """Refuse wrong values: PolicyError names the key."""
        check_number("kl", self.kl)
        check_number("hidden_error", self.hidden_error)
        check_number("warn_fraction", self.warn_fraction, high=1.0)


@final
class Divergence:
    """Outputs now against outputs at baseline, on random-token and calibration windows."""

    name: ClassVar[str] = "divergence"
    tier: ClassVar[str] = "T2"
    needs: ClassVar[frozenset[str]] = frozenset({"divergence"})
    Limits: ClassVar[type[DivergenceLimits]] = DivergenceLimits

    def judge(self, before: Readings, after: Readings, limits: DivergenceLimits) -> Verdict:
        """Judge each set of windows; the worst decides."""
        baseline = {reading.windows: reading for reading in before.divergence}
        measurements: list[Measurement] = []
        measured = 0
        for reading in after.divergence:
            gap = _unpaired(reading, baseline)
            if gap is None:
                measured += 1
                measurements += _judge_windows(reading, edit_kind(after), limits)
            else:
                measurements.append(_measure(reading, "kl", outcome=Outcome.NOT_MEASURED, reason=gap))
        gaps = "; ".join(f"{item.target}: {item.reason}" for item in measurements if item.reason)
        nothing = unmeasured(after, "divergence", gaps or "no forward pass was made")
        suffix = _blame(after) if any(item.outcome is Outcome.FAIL for item in measurements) else ""
        coverage = (measured, len(after.divergence))
        return conclude(self.name, measurements, coverage=coverage, nothing=nothing, suffix=suffix)


def _unpaired(reading: DivergenceReading, baseline: Mapping[str, DivergenceReading]) -> str | None:
    """Why a reading cannot be compared with the baseline; None when it can."""
    then = baseline.get(reading.windows)
    if baseline and then is None:
        return "the baseline was taken on other windows"
    if then is not None and then.windows_digest != reading.windows_digest:
        return "the windows are not those of the baseline (their digests differ)"
    if then is not None and not then.finite:
        return "the outputs at baseline were not finite"
    if reading.num_tokens < 1:
        return "the windows hold no token"
    if reading.finite and reading.kl is None and reading.hidden_error is None:
        return "neither logits nor a hidden state could be compared"
    return None


def _measure(
    reading: DivergenceReading,
    statistic: str,
    value: float | None = None,
    *,
    outcome: Outcome = Outcome.PASS,
    reason: str | None = None,
) -> Measurement:
    return Measurement(
        "divergence", f"{reading.windows} windows", statistic, value, 0.0, None, "model", outcome, reason
    )


def _judge_windows(reading: DivergenceReading, kind: str, limits: DivergenceLimits) -> Iterator[Measurement]:
    judged = ("kl", reading.kl, limits.kl)
    if reading.kl is None:
        judged = ("hidden_error", reading.hidden_error, limits.hidden_error)
    statistic, value, limit = judged
    if not reading.finite or (value is not None and not math.isfinite(value)):
        reason = reading.reason or "an output is NaN or infinite"
        broken = _measure(reading, "finite_outputs", 0.0, outcome=Outcome.FAIL, reason=reason)
        yield replace(broken, limit=1.0)
        return
    if value is None:
        return
    worst = _measure(reading, statistic, value)
    if kind == "train":
        yield worst
    elif value > limit:
        yield replace(worst, limit=limit, outcome=Outcome.FAIL)
    elif value > limits.warn_fraction * limit:
        warn = limits.warn_fraction * limit
        yield replace(worst, limit=warn, outcome=Outcome.WARN, reason=f"it fails above {limit:.4g}")
    else:
        yield replace(worst, limit=limit)
    for extra in ("kl_max", "top1_flip_rate"):
        if getattr(reading, extra) is not None:
            yield _measure(reading, extra, getattr(reading, extra))


def _blame(after: Readings) -> str:
    """The first damaged and the worst block, from the teacher-forced errors of each block."""
    errors = next((reading.blocks for reading in after.divergence if reading.blocks), ())
    if not errors:
        return ""
    sizes = [math.inf if math.isnan(item.relative_error) else item.relative_error for item in errors]
    worst = max(range(len(errors)), key=lambda index: sizes[index])
    first = next(index for index, size in enumerate(sizes) if size >= DAMAGED_FROM * sizes[worst] or math.isinf(size))
    text = f"; worst block {errors[worst].block} (relative error {errors[worst].relative_error:.3g})"
    return text if first == worst else f"{text}, first damaged block {errors[first].block}"
