"""Health guard (training): the diagnostics of a report of training health that was handed over with a window.

`weightproof.health` measures; nothing is measured here. Without a report the guard gives no verdict at all. A
diagnostic that failed or is invalid rejects the window; what was skipped is NOT_MEASURED, and a warning stays one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from weightproof.errors import PolicyError
from weightproof.guards.conclude import conclude, unmeasured
from weightproof.types import DiagnosticReading, Measurement, Outcome, Readings, Verdict

_OUTCOMES = {
    "pass": Outcome.PASS,
    "warn": Outcome.WARN,
    "fail": Outcome.FAIL,
    "invalid": Outcome.FAIL,
    "skipped": Outcome.NOT_MEASURED,
}


@dataclass(frozen=True, slots=True)
class HealthGuardLimits:
    """Limits of the health guard; thresholds of the diagnostics are those of the report (`HealthLimits`).

    Attributes:
        rejects: Whether a diagnostic that failed rejects the window (docs/health.md, four cases); else it warns.
    """

    rejects: bool = True

    def __post_init__(self) -> None:
        """Refuse wrong values: PolicyError names the key."""
        if not isinstance(self.rejects, bool):
            raise PolicyError(f"limit 'rejects' must be true or false, not {self.rejects!r}")


@final
class Health:
    """Training health, as it was diagnosed when the window ended."""

    name: ClassVar[str] = "health"
    tier: ClassVar[str] = "T2"
    optional: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"health"})
    Limits: ClassVar[type[HealthGuardLimits]] = HealthGuardLimits

    def judge(self, before: Readings, after: Readings, limits: HealthGuardLimits) -> Verdict:
        """Judge every diagnostic of the report."""
        del before  # a report is of one state
        found = after.health
        if found is None:
            nothing = unmeasured(after, "health", "nobody diagnosed the training")
            return conclude(self.name, (), coverage=(0, 0), nothing=nothing)
        measurements = [_judge(one, limits) for one in found.diagnostics]
        measured = sum(item.outcome is not Outcome.NOT_MEASURED for item in measurements)
        nothing = "every diagnostic was skipped"
        return conclude(self.name, measurements, coverage=(measured, len(measurements)), nothing=nothing)


def _judge(one: DiagnosticReading, limits: HealthGuardLimits) -> Measurement:
    outcome = _OUTCOMES.get(one.status, Outcome.NOT_MEASURED)
    if outcome is Outcome.FAIL and not limits.rejects:
        outcome = Outcome.WARN
    judged = outcome is not Outcome.NOT_MEASURED
    return Measurement(
        "health", one.location or one.name, one.name,
        one.value if judged else None, None, one.threshold if judged else None,
        outcome=outcome, reason=None if outcome is Outcome.PASS else one.message,
    )  # fmt: skip
