"""The table of a drill: what each fault does to a run, and what the guard makes of it. Pure bookkeeping.

A drill trains the same few steps again and again: a clean twin, then for every fault a run without a guard (does
it harm at all?) and a run under guard. `weightproof_callbacks.fault_drill` does the training.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from weightproof.statistics.window_reports import FAMILY, is_noted, words_of_report
from weightproof.transactions.steps import Step
from weightproof.types import Action, Measurement, Outcome

__all__ = [
    "ACTED",
    "HARMFUL",
    "Life",
    "Procedure",
    "Report",
    "Row",
    "Sighting",
    "reports",
    "row_of",
    "sightings",
    "table",
]

# A loss that ends so many nats a token above the clean twin's is harm.
HARMFUL = 0.02
# Checks within which a harmful fault must be found.
CHECKS = 2

ROLLED_BACK, LEFT_OUT, STOPPED, REPORTED, NOTHING = "rolled back", "step left out", "stopped", "reported", "nothing"
PUT_BACK = "put back"  # generators, after a resume
ACTED = (ROLLED_BACK, LEFT_OUT, STOPPED, PUT_BACK)


@dataclass(frozen=True, slots=True)
class Procedure:
    """How a drill trains.

    Attributes:
        before: Healthy steps, from which the guard learns what is usual.
        after: Steps after the one that a fault hits.
        every: Steps between two checks.
        batch_size: Windows of a batch on one process.
        window: Tokens of a window.
        learning_rate: Of AdamW.
        clip: Largest norm of the gradients; None: they are not clipped.
        seed: Of data order and generators.
        patience: Seconds that a process waits for the others where one of them is to be stuck.
    """

    before: int = 31
    after: int = 50
    every: int = 5
    batch_size: int = 8
    window: int = 32
    learning_rate: float = 1e-3
    clip: float | None = 1.0
    seed: int = 0
    patience: float = 10.0

    @property
    def fault_at(self) -> int:
        """The step that a fault hits first."""
        return self.before + 1

    @property
    def batches(self) -> int:
        """Batches that a run is given, on one process."""
        return self.fault_at + self.after

    @property
    def check_at(self) -> int:
        """The first step from `fault_at` on that ends with a check."""
        return -(-self.fault_at // self.every) * self.every


@dataclass(frozen=True, slots=True)
class Sighting:
    """Something that was noticed: at which step, by what, and what was done about it."""

    step: int
    by: str
    action: str


@dataclass(frozen=True, slots=True)
class Report:
    """A number that the record of a window reports, and judges by nothing.

    Attributes:
        step: Step that the window ends with.
        measurement: What is reported: statistic, value, and what was usual.
        noted: Whether it lies at or beyond the level from which it is noted.
    """

    step: int
    measurement: Measurement
    noted: bool

    @property
    def distance(self) -> float:
        """How many times the usual it is."""
        value, usual = self.measurement.value, self.measurement.reference
        return math.inf if value is None or not usual else value / usual

    @property
    def words(self) -> str:
        """What it is, its value, and what was usual."""
        return words_of_report(self.measurement)


@dataclass
class Life:
    """One run, and how it ended, on one process.

    Attributes:
        loss: Mean loss on held-out windows at the end, nats per token.
        weights: Digest of the weights at the end.
        training: Digest of moments, step counts and generators at the end.
        seen: What the guard noticed, in order.
        left_out: Positions of the batches whose optimizer step was left out, counted from 0.
        fired: What the fault did, in words.
        decisions: Digest of every decision, the same on all processes.
        reported: What the record of each judged window reports beside its verdicts.
        error: What ended the run early, if anything did.
    """

    loss: float = math.nan
    weights: str = ""
    training: str = ""
    seen: list[Sighting] = field(default_factory=list)
    left_out: set[int] = field(default_factory=set)
    fired: list[tuple[int, str]] = field(default_factory=list)
    decisions: list[str] = field(default_factory=list)
    reported: list[Report] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        fault: Its registered name.
        strength: Its parameters.
        harm: Loss without a guard minus that of the clean twin, nats; not finite where the loss is not.
        at: Step that it hit.
        detected: Step at which it was noticed; None if it was not.
        by: Guard and statistic.
        reported: What the records of the windows after the fault note, within two checks; empty if nothing.
        reported_clean: The same number in the same window of a clean run under guard; empty if it has none.
        told: Whether a number is noted that the clean run does not note in the same window.
        action: What was done.
        state: What the run is afterwards.
        loss: Loss under guard minus that of the clean twin; None for a run that was stopped.
        expected: Whether that is as it should be.
        decided: SHA-256 over the digests of all decisions, the same on all processes.
    """

    fault: str
    strength: str
    harm: float
    at: int
    detected: int | None
    by: str
    reported: str
    action: str
    state: str
    loss: float | None
    expected: bool
    decided: str = ""
    reported_clean: str = ""
    told: bool = False

    @property
    def harmful(self) -> bool:
        """Whether it harms a run without a guard."""
        return not self.harm <= HARMFUL

    def to_json(self) -> dict[str, Any]:
        """Numbers and words; a loss that is not finite in words, too."""
        values = {name: getattr(self, name) for name in self.__slots__}
        values["harmful"] = self.harmful
        return {
            name: repr(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }


def sightings(history: Sequence[Step]) -> list[Sighting]:
    """What a guard noticed in judged windows: rejections, steps left out, warnings."""
    found: list[Sighting] = []
    for step in history:
        decision = step.decision
        if decision is None:
            continue
        worst = _worst(step)
        if decision.action is Action.HALT:
            found.append(Sighting(step.step, worst or "processes", STOPPED))
        elif step.applied == "restored":
            found.append(Sighting(step.step, worst, ROLLED_BACK))
        elif any(one.statistic == "num_steps_skipped" and one.value for one in _measured(step)):
            found.append(Sighting(step.step, "invariants num_steps_skipped", LEFT_OUT))
        elif decision.warned:
            found.append(Sighting(step.step, worst, REPORTED))
    return found


def reports(history: Sequence[Step]) -> list[Report]:
    """What the record of each judged window reports beside its verdicts, whether it was rejected or not."""
    return [
        Report(step.step, one, is_noted(one))
        for step in history
        if step.decision is not None
        for one in step.decision.reported
        if one.family == FAMILY
    ]


def _told(
    found: Sequence[Report], clean: Sequence[Report], first: int, last: int
) -> tuple[Report | None, Report | None]:
    """What a run notes between two steps and the clean run does not, farthest from the usual; and the clean run's."""
    held = {(one.step, one.measurement.statistic): one for one in clean}
    noted = [one for one in found if one.noted and first <= one.step <= last]
    for one in sorted(noted, key=lambda one: -one.distance):
        theirs = held.get((one.step, one.measurement.statistic))
        if theirs is None or not theirs.noted:
            return one, theirs
    return None, None


def _measured(step: Step) -> list[Measurement]:
    return [one for verdict in step.verdicts for one in verdict.measurements]


def _worst(step: Step) -> str:
    """The first measurement of the worst outcome: guard, statistic and what it was measured on."""
    for outcome in (Outcome.FAIL, Outcome.NOT_MEASURED, Outcome.WARN):
        for verdict in step.verdicts:
            if verdict.outcome is not outcome:
                continue
            for one in verdict.measurements:
                if one.outcome is outcome and one.statistic == "inputs_disagree":
                    return f"digest of the batches ({(one.reason or '').partition(':')[0]})"
                if one.outcome is outcome:
                    return f"{one.guard} {one.statistic} ({one.target})"
            return verdict.guard
    return ""


def row_of(  # noqa: PLR0913 - one argument for each run of the comparison
    name: str,
    strength: str,
    procedure: Procedure,
    *,
    twin: Life,
    matched: Life,
    unguarded: Life,
    guarded: Life,
    state: str,
    clean: Life | None = None,
    at: int | None = None,
) -> Row:
    """Hold a run under guard against the clean twin, and against the same run without a guard.

    As it should be: a harmful fault is acted on within two checks, and the run ends where the clean twin does, or is
    stopped; a harmless one ends there whatever was done.

    Args:
        name: Of the fault.
        strength: Of the fault, in words.
        procedure: How all of them trained.
        twin: The clean run.
        matched: The clean run without the batches whose step was left out under guard.
        unguarded: With the fault, without a guard.
        guarded: With both.
        state: What the guarded run is afterwards, in words.
        clean: A clean run under guard, for what it reports; None: it reports nothing.
        at: Step that it hit; None: `procedure.fault_at`.
    """
    at = procedure.fault_at if at is None else at
    acted = next((one for one in guarded.seen if one.action in ACTED), None)
    first = acted or next(iter(guarded.seen), None)
    harm = unguarded.loss - twin.loss
    stopped = acted is not None and guarded.error is not None
    loss = None if stopped else guarded.loss - twin.loss
    unharmed = stopped or guarded.loss - matched.loss <= HARMFUL
    last = at + CHECKS * procedure.every
    report, theirs = _told(guarded.reported, [] if clean is None else clean.reported, at, last)
    in_time = acted is not None and acted.step <= last
    return Row(
        fault=name,
        strength=strength,
        harm=harm,
        at=at,
        detected=None if first is None else first.step,
        by="" if first is None else first.by,
        reported="" if report is None else report.words,
        action=NOTHING if first is None else first.action,
        state=state,
        loss=loss,
        expected=unharmed and (in_time or harm <= HARMFUL),
        decided=hashlib.sha256("".join(guarded.decisions).encode()).hexdigest(),
        reported_clean="" if theirs is None else _number(theirs.measurement.value),
        told=report is not None,
    )


COLUMNS = (
    "fault",
    "strength",
    "harm",
    "hit",
    "found",
    "by",
    "noted",
    "clean twin",
    "action",
    "state after",
    "loss",
    "",
)


def table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The rows in words, below their headings."""
    return [
        COLUMNS,
        *(
            (
                row.fault,
                row.strength,
                _nats(row.harm),
                str(row.at),
                "-" if row.detected is None else str(row.detected),
                row.by or "-",
                row.reported or "-",
                row.reported_clean or "-",
                row.action,
                row.state,
                "-" if row.loss is None else _nats(row.loss),
                "as expected" if row.expected else "NOT AS EXPECTED",
            )
            for row in rows
        ),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _nats(value: float) -> str:
    return f"{value:+.3f}" if math.isfinite(value) else "not finite"
