"""The report of training health: one entry a diagnostic, and what they say together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from weightproof.diagnostics.limits import HealthLimits
from weightproof.folders.jsonable import to_jsonable
from weightproof.types import DiagnosticReading, HealthReading

__all__ = ["SCHEMA", "Diagnostic", "HealthReport", "Layers", "Provenance", "Status", "worst"]

SCHEMA = "weightproof-health/1"
Layers = tuple[float | None, ...]


class Status(StrEnum):
    """What a diagnostic says.

    "invalid": there is a number and it cannot be one (NaN, infinite, out of its range): the network has diverged, or
    the measurement is broken. "skipped": there is no number, and the message says why. Neither is ever a pass.
    """

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"
    SKIPPED = "skipped"
    INVALID = "invalid"


_SEVERITY = {Status.SKIPPED: 0, Status.PASS: 1, Status.WARN: 2, Status.FAIL: 3, Status.INVALID: 4}


def worst(statuses: list[Status]) -> Status:
    """The worst status that is not "skipped"; "skipped" where there is no other.

    Example:
        >>> worst([Status.PASS, Status.SKIPPED, Status.WARN]).value
        'warn'
    """
    return max(statuses, key=_SEVERITY.__getitem__, default=Status.SKIPPED)


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One diagnostic.

    Attributes:
        name: "residual_growth", "total_growth", "collapse", "gradient_floor", "gradient_underflow", "scale_product",
            "stability" or "depth_utility".
        value: The number that is compared with the threshold; None where there is none.
        per_layer: The same quantity at every layer, None where it was not measured there.
        threshold: None where nothing is judged.
        status: What it says.
        location: The layer that `value` is from, by its public name.
        message: In one sentence.
        interval: 95 % interval of `value`, where there is one.
    """

    name: str
    value: float | None
    per_layer: Layers
    threshold: float | None
    status: Status
    location: str | None
    message: str
    interval: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what is not finite is written as text ("NaN", "Infinity")."""
        return to_jsonable(self)


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a report was read from; None where it is not known.

    Attributes:
        step: Step of the training.
        dtype: Of the residual stream.
        rows: Samples a batch (N); None where batches differ in size.
        batches: How many batches (B).
        tokens: Real tokens in all of them; samples where there are no tokens.
        seed: Of whatever was drawn (labels, random windows, new blocks).
        labels: "given", or "sampled" from the model's own distribution.
        reduction: How the loss that was given is reduced: "sum", "mean" or "none". Gradients are those of the sum.
        loss: Mean loss a scored token (or sample).
        model_digest: Of all weights; None where it was not asked for.
        notes: What else a reader must know.
    """

    step: int | None = None
    dtype: str | None = None
    rows: int | None = None
    batches: int | None = None
    tokens: int | None = None
    seed: int | None = None
    labels: str | None = None
    reduction: str | None = None
    loss: float | None = None
    model_digest: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class HealthReport:
    """What all diagnostics say about one state of a network.

    Attributes:
        diagnostics: By name, in the order in which they are shown.
        layers: Public name of each place of the residual stream: the inputs of the first blocks, the outputs of all.
        residual_norms: Median norm of a token there.
        residual_maxima: Largest norm of a token there: massive activations of single tokens are seen here alone.
        bp_grad_norms: Median norm there of the summed loss's gradient at a token.
        cross_batch: Mean cosine between batches there, as measured, not converted to another batch size.
        limits: The thresholds.
        provenance: What it was read from.
        method_name: Of what trained the network, as the caller says.
        notes: The caller's.
        headline_acc: Mean score of the network, where depth utility was measured.
        frozen_baseline_acc: Mean score of what it is compared with.
    """

    diagnostics: Mapping[str, Diagnostic]
    layers: tuple[str, ...] = ()
    residual_norms: Layers = ()
    residual_maxima: Layers = ()
    bp_grad_norms: Layers = ()
    cross_batch: Layers = ()
    limits: HealthLimits = field(default_factory=HealthLimits)
    provenance: Provenance = field(default_factory=Provenance)
    method_name: str = ""
    notes: str = ""
    headline_acc: float | None = None
    frozen_baseline_acc: float | None = None

    @property
    def overall(self) -> Status:
        """The worst status that is not "skipped"."""
        return worst([one.status for one in self.diagnostics.values()])

    @property
    def complete(self) -> bool:
        """Whether every diagnostic was measured."""
        return bool(self.diagnostics) and all(one.status is not Status.SKIPPED for one in self.diagnostics.values())

    @property
    def flags(self) -> tuple[str, ...]:
        """Names of the diagnostics that failed or are invalid."""
        return tuple(name for name, one in self.diagnostics.items() if one.status in (Status.FAIL, Status.INVALID))

    @property
    def verdict(self) -> str:
        """In the words of the first version of this report, which only a complete one may call trustworthy."""
        if self.flags:
            return f"needs walk-back: {', '.join(self.flags)}"
        skipped = [name for name, one in self.diagnostics.items() if one.status is Status.SKIPPED]
        if skipped or not self.diagnostics:
            return f"incomplete: {', '.join(skipped) or 'nothing'} not measured"
        return "trustworthy"

    @property
    def stability_layer(self) -> int | None:
        """The place in the middle of the network, whose agreement the first version reported."""
        return len(self.cross_batch) // 2 if self.cross_batch else None

    @property
    def cross_batch_stability(self) -> float | None:
        """Mean cosine between batches at `stability_layer`."""
        return None if self.stability_layer is None else self.cross_batch[self.stability_layer]

    @property
    def thresholds(self) -> dict[str, float]:
        """The four thresholds of the first version."""
        limits = self.limits
        return {
            "residual_growth": limits.block_growth,
            "bp_grad_norm": limits.gradient_floor,
            "cross_batch_stability": limits.stability,
            "frozen_baseline_margin": limits.depth_margin,
        }

    def metrics(self, prefix: str = "health/") -> dict[str, float]:
        """Finite numbers for a tracker: values, and 1 or 0 for each diagnostic that failed."""
        rows = {f"{prefix}{name}": one.value for name, one in self.diagnostics.items()}
        found = {name: float(value) for name, value in rows.items() if value is not None and math.isfinite(value)}
        severity = {f"{prefix}status/{name}": float(_SEVERITY[one.status]) for name, one in self.diagnostics.items()}
        return {**found, **severity, f"{prefix}status": float(_SEVERITY[self.overall])}

    def reading(self) -> HealthReading:
        """What a guard is handed with a window of training (`GuardSession.check_window(health=)`)."""
        found = [
            DiagnosticReading(one.name, str(one.status), one.value, one.threshold, one.location, one.message)
            for one in self.diagnostics.values()
        ]
        return HealthReading(tuple(found), self.provenance.step)

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON, with the keys of the first version among the others."""
        return {
            "schema": SCHEMA,
            "method_name": self.method_name,
            "notes": self.notes,
            "verdict": self.verdict,
            "overall": str(self.overall),
            "complete": self.complete,
            "diagnostics": {name: one.to_dict() for name, one in self.diagnostics.items()},
            "layers": list(self.layers),
            "residual_norms": to_jsonable(self.residual_norms),
            "residual_maxima": to_jsonable(self.residual_maxima),
            "bp_grad_norms": to_jsonable(self.bp_grad_norms),
            "cross_batch": to_jsonable(self.cross_batch),
            "stability_layer": self.stability_layer,
            "cross_batch_stability": to_jsonable(self.cross_batch_stability),
            "headline_acc": to_jsonable(self.headline_acc),
            "frozen_baseline_acc": to_jsonable(self.frozen_baseline_acc),
            "thresholds": self.thresholds,
            "limits": to_jsonable(self.limits),
            "provenance": to_jsonable(self.provenance),
        }

    def __str__(self) -> str:
        """For people: the verdict, then one line a diagnostic."""
        head = f"{self.method_name}: {self.verdict}" if self.method_name else self.verdict
        lines = [
            f"{one.status:8}{name:20}{shown(one.value):>11}  {one.message}" for name, one in self.diagnostics.items()
        ]
        return "\n".join([head, *lines, *([self.notes] if self.notes else [])])


def shown(value: float | None) -> str:
    """A number for people; a dash where there is none."""
    return "-" if value is None else f"{value:.3g}"
