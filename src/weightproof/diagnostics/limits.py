"""The thresholds of training health, each with its evidence; frozen, and refused where they are nonsense."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from weightproof.errors import InputError

__all__ = ["HealthLimits"]


@dataclass(frozen=True, slots=True)
class HealthLimits:
    """Thresholds.

    Attributes:
        block_growth: Largest healthy n_{l+1} / n_l. Over 3 seeds healthy networks stayed below 11 (25 early in a vision
            transformer) and failing ones exceeded 693: every threshold between gives the same answers.
        total_growth: n_L / n_0 from which growth over all blocks together is a warning.
        collapse: Smallest healthy n_{l+1} / n_l: the inverse of `block_growth`.
        gradient_floor: Smallest healthy norm of the summed loss's gradient at one token. Gradients of a mean loss were
            above 1e-4 in healthy networks and below 5e-9 in failing ones; a sum's are larger by what was averaged.
        underflow: Largest healthy share of gradient entries that are exactly zero or subnormal, of tokens that the
            loss reaches.
        stability: Largest cosine between mean gradients of disjoint batches of `stability_rows`.
        stability_rows: The batch size that `stability` is stated for; other sizes are converted.
        min_batches: Batches below which agreement is not judged.
        depth_margin: How much better than the baseline a network must be for its depth to be of use, in the unit of
            the scores (shares of right answers, nats per token).
    """

    block_growth: float = 50.0
    total_growth: float = 1e4
    collapse: float = 0.02
    gradient_floor: float = 1e-7
    underflow: float = 0.1
    stability: float = 0.30
    stability_rows: int = 128
    min_batches: int = 8
    depth_margin: float = 0.02

    def __post_init__(self) -> None:
        """Refuse what no threshold can be: InputError names it."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise InputError(f"the threshold {field.name!r} must be a finite number, not {value!r}")
            low, high, whole = _RANGES[field.name]
            if not low < value < high or (whole and value != int(value)):
                kind = "a whole number" if whole else "a number"
                upper = "" if math.isinf(high) else f" and below {high:g}"
                raise InputError(
                    f"the threshold {field.name!r} must be {kind} above {low:g}{upper}, not {value!r}"
                    + (" (scores are shares, not percent)" if field.name == "depth_margin" else "")
                )


_RANGES: dict[str, tuple[float, float, bool]] = {
    "block_growth": (1.0, math.inf, False),
    "total_growth": (1.0, math.inf, False),
    "collapse": (0.0, 1.0, False),
    "gradient_floor": (0.0, math.inf, False),
    "underflow": (0.0, 1.0, False),
    "stability": (0.0, 1.0, False),
    "stability_rows": (1.0, math.inf, True),
    "min_batches": (2.0, math.inf, True),
    "depth_margin": (-1.0, 1.0, False),
}
