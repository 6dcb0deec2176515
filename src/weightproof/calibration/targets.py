"""What a draw brings to each limit, and the tail of that under benign edits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from weightproof.calibration.draws import Draw
from weightproof.guards.limits import DEFAULT, for_family
from weightproof.policy import Policy

# Least spread of a tail in log units, where all values are about the same, and the fewest values that tell one.
_LEAST_SPREAD, _LEAST_TAIL = 0.05, 3


@dataclass(frozen=True)
class Target:
    """One limit: what it is called, and of which statistic of a draw it is the bound."""

    guard: str
    key: str
    statistic: str
    by_family: bool = False
    values_only: bool = False
    cap: str | None = None  # a gross limit of the same guard: what lies beyond is judged by that one


# The Frobenius norm has no limit of its own; it says how far the stable rank may go (see `fitting`).
SIZE = Target("spectral", "", "size", by_family=True, values_only=True, cap="gross_growth")
TARGETS = (
    Target("spectral", "kappa", "kappa", by_family=True, values_only=True, cap="gross_growth"),
    Target("spectral", "kappa_collapse", "kappa_collapse", by_family=True, values_only=True, cap="gross_collapse"),
    SIZE,
    Target("rmt", "epsilon", "epsilon", by_family=True, values_only=True),
    Target("circuits", "distance", "distance"),
    Target("variance", "band", "band", cap="gross_band"),
    Target("divergence", "kl", "kl"),
    Target("divergence", "hidden_error", "hidden_error"),
)


# Statistics whose limits are put at one score, from the finest division that draws may suffice for to the coarsest.
_OUTPUTS = ("kl", "hidden_error")
_WARNING = ("band", "distance", "epsilon", "kappa", "size", "kappa_collapse")
DIVISIONS = (
    (_OUTPUTS, ("band",), ("distance",), ("epsilon",), ("kappa", "size"), ("kappa_collapse",)),
    (_OUTPUTS, _WARNING),
    ((*_OUTPUTS, *_WARNING),),
)


class Values:
    """What a draw brings to a limit, by family; the floors of the tier decide what of a spike count is judged."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def of(self, draw: Draw, target: Target) -> dict[str, float]:
        """Family to value, at most the gross limit; one family "default" where the limit has none."""
        cap = self.cap(target)
        return {family: min(value, cap) for family, value in self._uncapped(draw, target).items()}

    def cap(self, target: Target) -> float:
        """The gross limit as the size of a logarithm; inf where there is none."""
        if target.cap is None:
            return math.inf
        gross = float(self.policy.limits[target.guard][target.cap])  # pyright: ignore[reportArgumentType]
        return gross if target.cap == "gross_band" else abs(math.log(gross)) if gross else math.inf

    def _uncapped(self, draw: Draw, target: Target) -> dict[str, float]:
        if target.values_only and draw.preserving:
            return {}
        if not target.by_family:
            return {DEFAULT: draw.statistics[target.statistic]} if target.statistic in draw.statistics else {}
        if target.statistic == "epsilon":
            return dict(self._epsilons(draw))
        prefix = f"{target.statistic}/"
        return {name.removeprefix(prefix): size for name, size in draw.statistics.items() if name.startswith(prefix)}

    def _epsilons(self, draw: Draw) -> Iterable[tuple[str, float]]:
        """The epsilon that each family needs, 0 where the additive floor does."""
        for name, moved in draw.statistics.items():
            stem, _, family = name.partition("/")
            if stem == "spikes_moved":
                worst, before = 2.0 * moved, draw.statistics.get(f"spikes/{family}", 0.0)
                floor = for_family(self.policy.limits["rmt"]["floor"], family)  # pyright: ignore[reportArgumentType]
                yield family, 0.0 if worst <= floor else worst / before if before else math.inf


@dataclass(frozen=True)
class Tail:
    """The upper tail of a statistic under benign edits, as that of a power law: the largest value, and its spread."""

    largest: float
    spread: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Tail:
        """Of positive values; the spread is the mean logarithm of the largest over those of the upper tenth."""
        ordered = sorted(values, reverse=True)
        tail = ordered[1 : 1 + max(_LEAST_TAIL, len(ordered) // 10)]
        spread = sum(math.log(ordered[0] / value) for value in tail) / len(tail) if tail else 0.0
        return cls(ordered[0], max(spread, _LEAST_SPREAD))

    def score(self, value: float) -> float:
        """How many spreads a value lies above the largest."""
        if value <= 0.0:
            return -math.inf
        return (math.log(value) - math.log(self.largest)) / self.spread if math.isfinite(value) else math.inf

    def at(self, score: float) -> float:
        """The value of a score."""
        return self.largest * math.exp(score * self.spread)
