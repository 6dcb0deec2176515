"""A guard of one's own: warns where the Frobenius norm of one matrix moved unlike that of all others.

Training with weight decay shrinks every matrix a little; a wrong learning rate for one group, or a merge of one wrong
tensor, moves one alone. Judged is each matrix's log ratio of norms, less the median over the model.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import ClassVar, final

from weightproof.errors import PolicyError
from weightproof.guards.conclude import conclude
from weightproof.types import Measurement, Outcome, Readings, Verdict


@dataclass(frozen=True, slots=True)
class UnevenDriftLimits:
    """Limits of the guard.

    Attributes:
        log_ratio: WARN beyond this distance from the median, in natural log units: 0.1 is 10 %, twice what int4
            rounding moves a norm by on the demo model.
    """

    log_ratio: float = 0.1

    def __post_init__(self) -> None:
        """Refuse what is no limit."""
        if not self.log_ratio > 0:
            raise PolicyError(f"'log_ratio' must be a number above 0, not {self.log_ratio!r}")


@final
class UnevenDrift:
    """Norms of matrices against their median drift."""

    name: ClassVar[str] = "uneven_drift"
    tier: ClassVar[str] = "T1"
    needs: ClassVar[frozenset[str]] = frozenset({"matrices"})
    Limits: ClassVar[type[UnevenDriftLimits]] = UnevenDriftLimits

    def judge(self, before: Readings, after: Readings, limits: UnevenDriftLimits) -> Verdict:
        """One measurement a matrix; a norm that is missing, zero or not finite is not measured."""
        drifts = {name: _log_ratio(before, after, name) for name in after.matrices}
        known = [drift for drift in drifts.values() if drift is not None]
        middle = statistics.median(known) if known else 0.0
        measurements = [
            self._judged(name, after.matrices[name].family, drift, middle, limits) for name, drift in drifts.items()
        ]
        nothing = "no matrix has a norm both before and after the change"
        return conclude(self.name, measurements, coverage=(len(known), len(drifts)), nothing=nothing)

    def _judged(
        self, name: str, family: str, drift: float | None, middle: float, limits: UnevenDriftLimits
    ) -> Measurement:
        if drift is None:
            reason = "it has no positive finite norm before and after"
            return Measurement(
                self.name, name, "log_norm_ratio", None, None, None, family, Outcome.NOT_MEASURED, reason
            )
        far = abs(drift - middle) > limits.log_ratio
        outcome = Outcome.WARN if far else Outcome.PASS
        return Measurement(self.name, name, "log_norm_ratio", drift - middle, middle, limits.log_ratio, family, outcome)


def _log_ratio(before: Readings, after: Readings, name: str) -> float | None:
    old = before.matrices[name].frobenius_norm if name in before.matrices else None
    new = after.matrices[name].frobenius_norm
    if not old or not new or not math.isfinite(old) or not math.isfinite(new):
        return None
    return math.log(new / old)
