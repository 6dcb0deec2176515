"""Circuits guard (T1): spectra of what heads and neurons compute, two-sided against the baseline.

Judged per layer and product (q'k, o v, up times down), over its heads, neurons or experts as one multiset: the
relative distance ||sort(after) - sort(before)|| / ||before||. It does not move when heads, neurons or experts are
permuted, when a scale or a rotation passes between the factors, or when a norm's gain is folded in: a change of
spectra alone is no damage, a change of these products is a change of the function.

Nothing here rejects but what is gross: a product that became zero, or grew or shrank tenfold.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

from weightproof.circuits import log_size_ratio, spectrum_distance
from weightproof.guards.conclude import conclude, edit_kind, unmeasured
from weightproof.guards.limits import check_number
from weightproof.types import CircuitReading, Measurement, Outcome, Readings, Verdict

FAMILIES = {"qk": "attn", "ov": "attn", "mlp": "ffn"}
# Experts of one layer may be permuted with their router's rows: they are judged together.
_EXPERT = re.compile(r"\[\d+\]|(?<=\bexperts)\.\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class CircuitLimits:
    """Limits of the circuits guard.

    Attributes:
        distance: Relative distance of one layer's spectrum of a product, calibrated on benign edits
            (docs/calibration.md); docs/guards/circuits.md has what quantization moves it by on trained models.
        gross_ratio: FAIL where a product's size changed by more than this factor, as for the top singular value of one
            matrix.
    """

    distance: float = 0.36
    gross_ratio: float = 10.0

    def __post_init__(self) -> None:
        """Refuse wrong values: PolicyError names the key."""
        check_number("distance", self.distance)
        check_number("gross_ratio", self.gross_ratio, low=1.0, strict=True)


@final
class Circuits:
    """Singular values of W_q' W_k and W_o W_v, and products of the norms of neurons."""

    name: ClassVar[str] = "circuits"
    tier: ClassVar[str] = "T1"
    needs: ClassVar[frozenset[str]] = frozenset({"circuits"})
    Limits: ClassVar[type[CircuitLimits]] = CircuitLimits

    def judge(self, before: Readings, after: Readings, limits: CircuitLimits) -> Verdict:
        """Judge every circuit read before and after; in a window of training all of it is reported only."""
        training = edit_kind(after) == "train"
        old, new = pooled(before), pooled(after)
        names = list(dict.fromkeys([*old, *new]))
        measurements: list[Measurement] = []
        measured = 0
        for name in names:
            found = _judge(name, old.get(name, []), new.get(name, []), limits)
            measured += found[0].outcome is not Outcome.NOT_MEASURED
            measurements += [_reported(item) for item in found] if training else found
        nothing = unmeasured(after, "circuits", "no circuit could be read both before and after the change")
        return conclude(self.name, measurements, coverage=(measured, len(names)), nothing=nothing)


def pooled(readings: Readings) -> dict[str, list[CircuitReading]]:
    """Circuits by name, those of the experts of one layer together."""
    groups: dict[str, list[CircuitReading]] = {}
    for name, reading in readings.circuits.items():
        groups.setdefault(_EXPERT.sub("", name), []).append(reading)
    return groups


def _judge(
    name: str, before: Sequence[CircuitReading], after: Sequence[CircuitReading], limits: CircuitLimits
) -> list[Measurement]:
    known = (*before, *after)[0]
    base = Measurement("circuits", name, "relative_distance", None, None, None, FAMILIES.get(known.kind, "other"))
    if (gap := _gap(before, "before")) is not None:
        return [replace(base, outcome=Outcome.NOT_MEASURED, reason=gap)]
    if (gap := _gap(after, "after")) is not None:
        return [replace(base, outcome=Outcome.WARN, reason=gap)]
    old, new = (tuple(value for one in side for value in one.values or ()) for side in (before, after))
    if len(old) != len(new):
        reason = f"it has {len(old)} values before and {len(new)} after the change"
        return [replace(base, outcome=Outcome.WARN, reason=reason)]
    size = log_size_ratio(old, new)
    if size is None:
        reason = "it was zero before the change, so there is no ratio"
        return [replace(base, outcome=Outcome.NOT_MEASURED, reason=reason)]
    distance = spectrum_distance(old, new)
    far = replace(base, value=distance, reference=math.hypot(*old), limit=limits.distance)
    gross = math.log(limits.gross_ratio)
    log_ratio = replace(base, statistic="log_size_ratio", value=size, limit=gross)
    return [
        replace(far, outcome=Outcome.WARN if distance > limits.distance else Outcome.PASS),
        replace(log_ratio, outcome=Outcome.FAIL if abs(size) > gross else Outcome.PASS),
    ]


def _gap(side: Sequence[CircuitReading], when: str) -> str | None:
    """Why one side has no numbers."""
    if not side:
        return f"there is no such circuit {when} the change"
    unread = next((one for one in side if one.values is None), None)
    return None if unread is None else f"not measured {when} the change: {unread.reason or 'no reason was given'}"


def _reported(item: Measurement) -> Measurement:
    """In training spectra are meant to move."""
    if item.outcome is Outcome.NOT_MEASURED:
        return item
    if item.value is None:
        return replace(item, outcome=Outcome.NOT_MEASURED)
    return replace(item, limit=None, outcome=Outcome.PASS)
