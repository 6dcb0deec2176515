"""Which directions came with a merge or with steering, by matrix, from the readings and verdicts of a certificate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightproof.reporting.words import number, plural

MOST = 12
"""Matrices shown."""
_GUARD, _COUNT = "subspace", "num_intruder_dimensions"


@dataclass(frozen=True)
class NewDirections:
    """One matrix.

    Attributes:
        name: Of the matrix.
        count: Leading directions that are new since the baseline; None where nothing was read.
        earlier: How many low cosines earlier changes left.
        least: Smallest agreement of a leading direction with those before this change; None where there is none.
        stored: The stored direction that the change writes into most, and its cosine; empty without any.
        note: Why nothing was read.
    """

    name: str
    count: int | None
    earlier: int
    least: float | None
    stored: str
    note: str


@dataclass(frozen=True)
class Directions:
    """What is known of the directions of one change.

    Attributes:
        rows: Matrices, those with most new directions first.
        others: How many are not among them.
        total: New directions in all matrices.
        changed: In how many matrices there are some.
        read: How many matrices were read.
        digest: Of the stored directions, empty without any.
        not_compared: Stored directions that fit no changed matrix.
    """

    rows: tuple[NewDirections, ...]
    others: int
    total: int
    changed: int
    read: int
    digest: str
    not_compared: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """How many directions are new, and where most of them are."""
        if not self.read:
            return "Of no matrix directions could be read."
        if not self.total:
            return f"None of the leading directions of {plural(self.read, 'matrix', 'matrices')} is new."
        told = f"{plural(self.total, 'leading direction')} of {plural(self.changed, 'matrix', 'matrices')}"
        verb = "is" if self.total == 1 else "are"
        return f"{told} (of {self.read} that were read) {verb} new, most of them in {self.rows[0].name}."

    @property
    def left_out(self) -> str:
        """Stored directions that nothing could be compared with, in a sentence."""
        if not self.not_compared:
            return ""
        return f"Stored directions that fit no changed matrix: {', '.join(self.not_compared)}."


def directions(step: Mapping[str, Any], after: Mapping[str, Any]) -> Directions | None:
    """What a step's readings say of directions; None where nothing was merged or steered.

    Args:
        step: As the certificate carries it.
        after: Readings of the changed model; empty where the certificate has them no more.
    """
    reading = after.get("subspace")
    if not reading:
        return None
    counts = _counts(step)
    rows = [_row(one, counts.get(one["name"])) for one in reading["matrices"]]
    known = [row.count for row in rows if row.count is not None]
    rows.sort(key=lambda row: (row.count is None, -(row.count or 0), 1.0 if row.least is None else row.least))
    return Directions(
        rows=tuple(rows[:MOST]),
        others=max(0, len(rows) - MOST),
        total=sum(known),
        changed=sum(count > 0 for count in known),
        read=len(known),
        digest=str(reading.get("directions") or ""),
        not_compared=tuple(map(str, reading.get("not_compared") or ())),
    )


def _row(one: Mapping[str, Any], count: float | None) -> NewDirections:
    cosines = [value for value in one["cosines"] or () if _is_number(value)]
    return NewDirections(
        name=str(one["name"]),
        count=None if count is None else int(count),
        earlier=len(one["earlier"]),
        least=min(cosines) if cosines else None,
        stored=_strongest(one["stored"]),
        note=str(one.get("reason") or ""),
    )


def _strongest(stored: Sequence[Mapping[str, Any]]) -> str:
    known = [one for one in stored if _is_number(one["cosine"])]
    if not known:
        return ""
    worst = max(known, key=lambda one: abs(one["cosine"]))
    return f"{worst['direction']} {number(worst['cosine'])}"


def _counts(step: Mapping[str, Any]) -> dict[str, float]:
    """What the guard counted in each matrix."""
    verdicts = [one for one in step["verdicts"] if one["guard"] == _GUARD]
    items = [item for one in verdicts for item in one["measurements"] if item["statistic"] == _COUNT]
    return {item["target"]: item["value"] for item in items if _is_number(item["value"])}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
