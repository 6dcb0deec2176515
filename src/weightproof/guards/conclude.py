"""From measurements to one verdict: the worst one decides and is named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from weightproof.types import Measurement, Outcome, Readings, Verdict

SEVERITY = {Outcome.NOT_MEASURED: -1, Outcome.PASS: 0, Outcome.WARN: 1, Outcome.FAIL: 2}


class Guard(Protocol):
    """What a registered guard offers; see `weightproof.guards`."""

    name: str
    tier: str
    needs: frozenset[str]


def edit_kind(after: Readings) -> str:
    """Name of the declared kind of change; `unknown` where nothing was declared."""
    return after.edit.kind if after.edit is not None else "unknown"


def unmeasured(after: Readings, probe: str, otherwise: str) -> str:
    """Why a probe gave nothing at all."""
    return after.unmeasured.get(probe, otherwise)


def excess(measurement: Measurement) -> float:
    """How far a judged value lies towards its limit (1 = at it); 0 where it is not judged."""
    if measurement.value is None or measurement.limit is None:
        return 0.0
    if measurement.value != measurement.value:
        return float("inf")
    size = abs(measurement.value)
    return size / abs(measurement.limit) if measurement.limit else float("inf") * size if size else 0.0


def sentence(measurement: Measurement) -> str:
    """One clause with target, statistic, value and limit."""
    text = f"{measurement.target}: {measurement.statistic}"
    if measurement.value is not None:
        text += f" = {measurement.value:.4g}"
    if measurement.limit is not None:
        text += f" (limit {measurement.limit:.4g})"
    return f"{text}, {measurement.reason}" if measurement.reason else text


def worst_of(measurements: Sequence[Measurement]) -> Measurement | None:
    """The most severe judged measurement, the largest excess first; None when none was judged."""
    judged = [item for item in measurements if item.limit is not None or item.outcome is not Outcome.PASS]
    return max(judged, key=lambda item: (SEVERITY[item.outcome], excess(item)), default=None)


def conclude(
    guard: str, measurements: Sequence[Measurement], *, coverage: tuple[int, int], nothing: str, suffix: str = ""
) -> Verdict:
    """Verdict of a guard: its worst measurement, or NOT_MEASURED with the reason `nothing`.

    Args:
        guard: Name of the guard.
        measurements: Every judged or reported number.
        coverage: Targets of which at least one statistic was read, and targets in scope.
        nothing: Why there is no verdict, used when no target was measured and nothing failed.
        suffix: Added to the reason (for example the blocks that a failure is located in).
    """
    measured, eligible = coverage
    worst = worst_of(measurements)
    failed = worst is not None and worst.outcome is Outcome.FAIL
    if not measured and not failed:
        return Verdict(guard, Outcome.NOT_MEASURED, tuple(measurements), nothing, 0, eligible)
    outcome = Outcome.PASS
    if worst is not None and SEVERITY[worst.outcome] > 0:
        outcome = worst.outcome
    others = sum(item.outcome is outcome for item in measurements) - 1 if outcome is not Outcome.PASS else 0
    reason = (
        "every value is finite and none is judged in this kind of change"
        if worst is None or worst.outcome is Outcome.NOT_MEASURED
        else sentence(worst)
    )
    if outcome is Outcome.PASS and worst is not None:
        reason = f"worst of {measured} measured: {reason}"
    if others > 0:
        reason += f", and {others} more"
    return Verdict(guard, outcome, tuple(measurements), reason + suffix, measured, eligible)
