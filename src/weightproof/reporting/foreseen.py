"""What a change should cost by curvature, matrix by matrix, from the readings and verdicts of a certificate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightproof.reporting.words import number, percent, plural

MOST = 12
"""Matrices shown; the others are added up."""
_GUARD = "curvature"


@dataclass(frozen=True)
class ForeseenMatrix:
    """One matrix: predicted nats per token, their share of the whole, ||E|| / ||W||, and what to know of it."""

    name: str
    predicted: float
    share: float
    relative_change: Any
    note: str


@dataclass(frozen=True)
class Foreseen:
    """What curvature foretells of one change.

    Attributes:
        rows: The matrices that are to blame most, worst first.
        others: How many measured matrices are not among them.
        rest: What those cost together, nats per token.
        total: Of all, nats per token.
        measured: Change of the loss on the retain data, nats per token; None where it was not measured.
        not_covered: Changed matrices without factors.
        unread: Name and reason of matrices that have factors and could not be predicted.
        factors: Digest of the factors.
    """

    rows: tuple[ForeseenMatrix, ...]
    others: int
    rest: float
    total: float
    measured: float | None
    not_covered: tuple[str, ...]
    unread: tuple[tuple[str, str], ...]
    factors: str

    @property
    def sentence(self) -> str:
        """Which matrix is to blame most, and for how much."""
        if not self.rows:
            return "By curvature nothing can be said of this change."
        if not self.total:
            return "By curvature the change should cost nothing."
        worst = self.rows[0]
        told = (
            f"By curvature {worst.name} is to blame most: {number(worst.predicted)} of {number(self.total)} nats per "
            f"token ({percent(worst.share)}) are predicted for it"
        )
        return f"{told}; {number(self.measured)} were measured in all." if self.measured is not None else f"{told}."

    @property
    def left_out(self) -> str:
        """What the prediction says nothing of, in a sentence; empty where it covers everything."""
        told = []
        if self.not_covered:
            told.append(
                f"{plural(len(self.not_covered), 'changed matrix', 'changed matrices')} without factors, "
                f"{self.not_covered[0]} among them"
            )
        told += [f"{name} ({reason})" for name, reason in self.unread]
        return f"Not in the sum: {'; '.join(told)}." if told else ""


def foreseen(step: Mapping[str, Any], after: Mapping[str, Any]) -> Foreseen | None:
    """What a step's readings foretell; None where there were no factors.

    Args:
        step: As the certificate carries it.
        after: Readings of the changed model; empty where the certificate has them no more.
    """
    forecast = after.get("curvature")
    if not forecast:
        return None
    matrices = forecast["matrices"]
    known = sorted((one for one in matrices if _is_number(one["predicted"])), key=lambda one: -one["predicted"])
    total = math.fsum(one["predicted"] for one in known)
    notes = _notes(step)
    rows = tuple(
        ForeseenMatrix(
            str(one["name"]),
            one["predicted"],
            one["predicted"] / total if total else 0.0,
            one["relative_change"],
            notes.get(one["name"], ""),
        )
        for one in known[:MOST]
    )
    rest = math.fsum(one["predicted"] for one in known[MOST:])
    unread = tuple((str(one["name"]), str(one["reason"])) for one in matrices if one.get("reason") is not None)
    others = tuple(map(str, forecast.get("not_covered") or ()))
    counts = len(known) - len(rows), rest, total
    return Foreseen(rows, *counts, _measured(step.get("losses") or ()), others, unread, str(forecast["factors"]))


def _notes(step: Mapping[str, Any]) -> dict[str, str]:
    """What the guard said of each matrix."""
    verdicts = [one for one in step["verdicts"] if one["guard"] == _GUARD]
    return {item["target"]: str(item["reason"]) for one in verdicts for item in one["measurements"] if item["reason"]}


def _measured(losses: Sequence[Mapping[str, Any]]) -> float | None:
    for loss in losses:
        if loss.get("role") == "retain" and loss.get("metric") == "nll" and _is_number(loss.get("difference")):
            return loss["difference"]
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
