"""Subspace guard (advice): intruder dimensions of merges and steering, and changes that write into stored directions.

An intruder dimension is a leading left singular vector of W' that has a low cosine with every left singular vector of
W: the change added a strong direction of its own instead of turning those that were there. Adapters merged one after
the other add to the count, which is that since the baseline. Stored directions are those the user keeps: an alarm says
that the change writes into one.

It warns and decides nothing: most adapters that learned something have intruders, and outputs decide what they cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, final

from weightproof.errors import PolicyError
from weightproof.guards.conclude import conclude, unmeasured
from weightproof.guards.limits import check_count, check_number
from weightproof.types import DirectionsReading, Measurement, Outcome, Readings, SubspaceReading, Verdict

INTRUDERS = "num_intruder_dimensions"
# A cosine this many times the root mean square of random directions is not chance, whatever the width.
_CHANCES = 4.0


@dataclass(frozen=True, slots=True)
class SubspaceLimits:
    """Limits of the subspace guard.

    Attributes:
        cosine: A leading direction whose largest cosine with those before is below this is an intruder;
            docs/guards/subspace.md.
        max_intruders: WARN above so many in one matrix since the baseline.
        top: How many leading directions of each changed matrix are looked at; arXiv 2410.21228 takes 10.
        max_side: Matrices whose shorter side is longer are not looked at for intruders; 0 for none at all. The cost
            grows with the number of elements (docs/guards/subspace.md).
        direction_cosine: WARN above this cosine with a stored direction; where random directions reach it, above 4
            times their root mean square instead.
        directions: Path of the stored directions (see `judgement.stored_directions`); None for none.
    """

    cosine: float = 0.5
    max_intruders: int = 0
    top: int = 10
    max_side: int = 16384
    direction_cosine: float = 0.3
    directions: str | None = None

    def __post_init__(self) -> None:
        """Refuse wrong values: PolicyError names the key."""
        check_number("cosine", self.cosine, high=1.0, strict=True)
        check_count("max_intruders", self.max_intruders)
        check_count("top", self.top, low=1)
        check_count("max_side", self.max_side)
        check_number("direction_cosine", self.direction_cosine, high=1.0, strict=True)
        if self.directions is not None and (not isinstance(self.directions, str) or not self.directions):
            raise PolicyError(f"limit 'directions' must be the path of stored directions, not {self.directions!r}")


@final
class Subspace:
    """Directions that came with a change; a warning at most."""

    name: ClassVar[str] = "subspace"
    tier: ClassVar[str] = "advice"
    optional: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"subspace"})
    Limits: ClassVar[type[SubspaceLimits]] = SubspaceLimits

    def judge(self, before: Readings, after: Readings, limits: SubspaceLimits) -> Verdict:
        """Judge every matrix that was read; of one without learned structure directions mean nothing."""
        del before  # the readings are of the change itself, and of those before it
        found = after.subspace
        if found is None:
            nothing = unmeasured(after, "subspace", "no adapter was merged and nothing was steered")
            return conclude(self.name, (), coverage=(0, 0), nothing=nothing)
        measurements: list[Measurement] = []
        measured = 0
        for one in found.matrices:
            items = list(_of_matrix(one, limits, untrained=one.name in after.untrained))
            measured += any(item.outcome is not Outcome.NOT_MEASURED for item in items)
            measurements += items
        coverage = (measured, len(found.matrices))
        suffix = _suffix(found) if measured else ""
        return conclude(self.name, measurements, coverage=coverage, nothing=_nothing(found), suffix=suffix)


def _of_matrix(one: DirectionsReading, limits: SubspaceLimits, *, untrained: bool) -> Iterator[Measurement]:
    base = Measurement("subspace", one.name, INTRUDERS, None, None, None, one.family)
    if untrained:
        reason = "it had no learned structure before: every direction of it is new"
        yield replace(base, outcome=Outcome.NOT_MEASURED, reason=reason)
    elif one.cosines is None:
        yield replace(base, outcome=Outcome.NOT_MEASURED, reason=one.reason or "it was not read")
    else:
        yield from _intruders(base, one, limits)
    for stored in one.stored:
        limit = min(1.0, max(limits.direction_cosine, _CHANCES * stored.chance))
        yield replace(
            base,
            statistic="stored_direction_cosine",
            value=stored.cosine,
            reference=stored.chance,
            limit=limit,
            outcome=Outcome.WARN if abs(stored.cosine) > limit else Outcome.PASS,
            reason=f"with the stored direction {stored.direction!r}",
        )


def _intruders(base: Measurement, one: DirectionsReading, limits: SubspaceLimits) -> Iterator[Measurement]:
    """The count since the baseline; only reported of a matrix that this change left alone."""
    own = [value for value in one.cosines or () if value < limits.cosine]
    earlier = [value for value in one.earlier if value < limits.cosine]
    count = len(own) + len(earlier)
    breach = bool(one.cosines) and count > limits.max_intruders
    words = None
    if breach:
        words = f"its directions agree with those before by {min(own or earlier):.2f} at the least"
        words += f"; {len(earlier)} of them came with earlier changes" if earlier else ""
    yield replace(
        base,
        value=float(count),
        reference=0.0,
        limit=float(limits.max_intruders) if one.cosines else None,
        outcome=Outcome.WARN if breach else Outcome.PASS,
        reason=words,
    )
    if one.cosines:
        yield replace(base, statistic="least_direction_cosine", value=min(one.cosines), reference=1.0)


def _nothing(found: SubspaceReading) -> str:
    unread = [one for one in found.matrices if one.reason is not None]
    return f"{unread[0].name}: {unread[0].reason}" if unread else "no weight matrix changed"


def _suffix(found: SubspaceReading) -> str:
    if not found.not_compared:
        return ""
    return f"; the stored direction {found.not_compared[0]!r} fits no changed matrix" + (
        f", nor do {len(found.not_compared) - 1} more" if len(found.not_compared) > 1 else ""
    )
