"""What a report says, read from a certificate alone: the decision first, then what it rests on.

Certificates come from anywhere. Nothing is taken for granted beyond what the format promises, and what is not
there is left out of the report rather than guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightproof.judgement.situations import SITUATIONS
from weightproof.reporting.directions import Directions, directions
from weightproof.reporting.foreseen import Foreseen, foreseen
from weightproof.reporting.heat import HeatMap, heat_map
from weightproof.reporting.pictures import is_higher_better, share_of_limit
from weightproof.reporting.spectra import SpectralChange, spectral_changes
from weightproof.reporting.words import number, percent, plural

WORST = 8
"""Measurements shown for one step; the certificate has all that were kept."""
_NAMED = 4  # tensors named in a sentence
GUARDS = (
    "loss",
    "divergence",
    "variance",
    "circuits",
    "curvature",
    "subspace",
    "health",
    "spectral",
    "rmt",
    "invariants",
)
"""Order of equally bad verdicts: what says whether, before what says where."""
_RANK = {"FAIL": 3, "NOT_MEASURED": 2, "WARN": 1, "PASS": 0}


@dataclass(frozen=True)
class LossFacts:
    """One paired measurement of a loss, the limit it was held against and what came of it."""

    reading: Mapping[str, Any]
    limit: float | None
    outcome: str


@dataclass(frozen=True)
class StepFacts:
    """One judged change.

    Attributes:
        raw: The step as the certificate carries it.
        status: keep, warned, rollback, halt or undecided: one word for the eye.
        word: The same for the reader.
        worst: Judged measurements, worst first.
        losses: Paired losses.
        heat: Change by layer; None where nothing changed, or for training, which changes all.
        spectra: Sketches of spectra before and after.
        changes: Spectral numbers before and after of the most changed matrices.
        foreseen: What curvature foretells of it; None where there were no factors.
        directions: Which directions came with it; None where nothing was merged or steered.
    """

    raw: Mapping[str, Any]
    status: str
    word: str
    worst: tuple[Mapping[str, Any], ...]
    losses: tuple[LossFacts, ...]
    heat: HeatMap | None
    spectra: tuple[Mapping[str, Any], ...]
    changes: tuple[SpectralChange, ...]
    foreseen: Foreseen | None = None
    directions: Directions | None = None

    @property
    def name(self) -> str:
        """Name of the change."""
        return str(self.raw.get("name", "unnamed"))

    @property
    def kind(self) -> str:
        """What the change declared itself to be."""
        return str(self.raw.get("kind") or (self.raw.get("record") or {}).get("kind", "unknown"))

    @property
    def reverted(self) -> tuple[str, ...]:
        """Tensors of the change that were taken back so that the rest could be kept."""
        return tuple((self.raw.get("record") or {}).get("reverted") or ())

    @property
    def verdicts(self) -> list[Mapping[str, Any]]:
        """Verdicts, the worst and most telling first."""
        return sorted(self.raw["verdicts"], key=_importance, reverse=True)

    @property
    def is_quiet(self) -> bool:
        """Whether it is a window of ordinary training that was kept without a warning."""
        return self.kind == "train" and self.status == "keep"

    @property
    def situation(self) -> str:
        """The line of the policy's table that fitted, in words."""
        key = str(self.raw.get("situation", ""))
        return SITUATIONS.get(key, key.replace("_", " "))

    @property
    def because(self) -> str:
        """What made the situation what it is: the reason without the policy and the situation before it."""
        reason = str(self.raw.get("reason") or "")
        _, found, rest = reason.partition(f"{self.situation}: ")
        return rest if found else reason


@dataclass(frozen=True)
class Facts:
    """Everything a report shows."""

    certificate: Any
    predicate: Mapping[str, Any]
    steps: tuple[StepFacts, ...]
    main: StepFacts | None
    lead: str
    overrides: tuple[tuple[str, str], ...]

    @property
    def subject(self) -> str:
        """Name of the model."""
        return str(self.certificate.statement["subject"][0].get("name") or "model")

    @property
    def title(self) -> str:
        """What the report is about: the model and the change, or the two folders that were compared."""
        if self.main is None:
            return self.subject
        if self.main.name == self.subject:
            return f"{self.subject}, changed from {_base_name(self.predicate)}"
        return f"{self.subject}: {self.main.name}"

    @property
    def status(self) -> str:
        """Status of the decision that the report is about."""
        return "none" if self.main is None else self.main.status

    @property
    def word(self) -> str:
        """The decision in a word."""
        return "NOTHING JUDGED" if self.main is None else self.main.word

    @property
    def timeline(self) -> tuple[tuple[StepFacts, ...], ...]:
        """Steps in order; neighbouring windows of quiet training stand together."""
        groups: list[list[StepFacts]] = []
        for step in self.steps:
            if groups and step.is_quiet and groups[-1][0].is_quiet:
                groups[-1].append(step)
            else:
                groups.append([step])
        return tuple(map(tuple, groups))


def facts_of(certificate: Any) -> Facts:
    """Read a certificate for a report.

    Raises:
        LookupError, TypeError, AttributeError, ValueError: The predicate is not shaped as the format says.
    """
    predicate = certificate.predicate
    steps = tuple(_step(raw, _readings(predicate, raw)) for raw in predicate["steps"])
    decision = predicate.get("decision")
    main = steps[decision["index"]] if decision else None
    name = "" if main is None else _change_name(main, certificate.subject_name, predicate)
    return Facts(certificate, predicate, steps, main, _lead(main, name, steps), _overrides(predicate))


def _readings(predicate: Mapping[str, Any], raw: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Readings before and after one step; empty where the certificate has them no more."""
    judged, table = raw.get("judged_on") or {}, predicate["readings"]
    return table.get(judged.get("before"), {}), table.get(judged.get("after"), {})


def _step(raw: Mapping[str, Any], readings: tuple[Mapping[str, Any], Mapping[str, Any]]) -> StepFacts:
    before, after = readings
    record = raw.get("record") or {}
    deltas = record.get("relative_delta") or {}
    every = [item for verdict in raw["verdicts"] for item in verdict["measurements"]]
    judged = [item for item in every if item["limit"] is not None or item["outcome"] != "PASS"]
    measured = [name for name, item in (before.get("matrices") or {}).items() if item.get("reason") is None]
    status, word = _status(raw)
    return StepFacts(
        raw,
        status,
        word,
        tuple(sorted(judged, key=severity, reverse=True)),
        _losses(raw, judged),
        heat_map(deltas, measured) if deltas else None,
        tuple(raw.get("spectra") or ()),
        spectral_changes(deltas, before, after),
        foreseen(raw, after),
        directions(raw, after),
    )


def _status(raw: Mapping[str, Any]) -> tuple[str, str]:
    action, situation = str(raw.get("action")), raw.get("situation")
    if action == "HALT":
        return "halt", "HALT"
    if situation == "loss_undecided":
        return "undecided", "UNDECIDED"
    if action == "KEEP":
        return ("warned", "KEEP, with a warning") if raw.get("warned") else ("keep", "KEEP")
    return "rollback", "ROLLBACK"


def severity(item: Mapping[str, Any]) -> tuple[int, int, float]:
    """Sort key of a measurement: outcome, guard, then how far towards its limit, or beyond."""
    share = share_of_limit(item.get("value"), item.get("limit"))
    return *_importance(item), -1.0 if share is None else share


def _importance(item: Mapping[str, Any]) -> tuple[int, int]:
    """Sort key of a verdict or measurement: the worst and most telling highest."""
    place = GUARDS.index(item["guard"]) if item["guard"] in GUARDS else len(GUARDS)
    return _RANK.get(str(item["outcome"]), 0), -place


def _losses(raw: Mapping[str, Any], judged: Sequence[Mapping[str, Any]]) -> tuple[LossFacts, ...]:
    outcomes = {verdict["guard"]: str(verdict["outcome"]) for verdict in raw["verdicts"]}
    found = raw.get("losses") or ()
    return tuple(_loss(reading, judged, outcomes.get("loss", "NOT_MEASURED")) for reading in found)


def _loss(reading: Mapping[str, Any], judged: Sequence[Mapping[str, Any]], outcome: str) -> LossFacts:
    """A reading with the measurement that judged it: its limit is one of harm, whatever way the metric counts."""
    name = f"{reading.get('role')} {reading.get('metric')}"
    mine = next((item for item in judged if item["guard"] == "loss" and item["target"] == name), None)
    if mine is None:
        return LossFacts(reading, None, outcome)
    limit = mine["limit"]
    if not isinstance(limit, int | float):
        return LossFacts(reading, None, str(mine["outcome"]))
    return LossFacts(reading, -limit if is_higher_better(reading) else float(limit), str(mine["outcome"]))


# -- sentences -------------------------------------------------------------------------------------


def _base_name(predicate: Mapping[str, Any]) -> str:
    return str(predicate["baseline"].get("name") or "the base")


def _change_name(main: StepFacts, subject: str, predicate: Mapping[str, Any]) -> str:
    """What changed, as the subject of a sentence."""
    if main.kind == "train":
        return f"the last window of training (step {main.raw.get('step')})"
    if main.name == subject:  # two folders: the change has no name of its own
        return f"the change from \u201c{_base_name(predicate)}\u201d to \u201c{subject}\u201d"
    return f"the change \u201c{main.name}\u201d"


def _lead(main: StepFacts | None, name: str, steps: Sequence[StepFacts]) -> str:
    """The decision in two sentences for somebody who has never heard of the guard."""
    if main is None:
        return "The model was read, but no change of its weights has been judged yet."
    return f"{_what_happened(main, name)} {_what_it_means(main, steps)}".strip()


def _what_happened(main: StepFacts, name: str) -> str:
    if main.status == "undecided":
        return f"The measured loss cannot tell whether {name} does harm."
    told = {
        "halt": "could not be vouched for, and the guard stopped.",
        "rollback": f"was rejected: {main.situation}.",
        "warned": "is kept, but a guard warns about it.",
        "keep": "is kept: no guard found harm in it.",
    }
    return f"{name[0].upper()}{name[1:]} {told[main.status]}"


def _what_it_means(main: StepFacts, steps: Sequence[StepFacts]) -> str:
    applied, action = main.raw.get("applied"), main.raw.get("action")
    if action == "KEEP" and main.reverted:
        return _in_part(main.reverted)
    if main.status == "halt":
        return "Do not use this model."
    if main.raw.get("monitor") and action != "KEEP":
        return "The guard was only watching (monitor mode), so the change is still in the model."
    if applied == "restored":
        return f"It was taken back, bit for bit: this certificate is about the model as it was before.{_left(steps)}"
    if action == "ROLLBACK":
        return "The changed model should not be used in place of the base."
    return "The policy keeps it all the same." if main.status == "undecided" else ""


def _in_part(reverted: Sequence[str]) -> str:
    shown = ", ".join(reverted[:_NAMED])
    more = f" and {len(reverted) - _NAMED} more" if len(reverted) > _NAMED else ""
    return f"Of the whole of it, {plural(len(reverted), 'tensor')} had to be taken back: {shown}{more}."


def _left(steps: Sequence[StepFacts]) -> str:
    """Which earlier changes are in the model that is left."""
    kept = [step.name for step in steps if step.kind != "train" and step.raw.get("applied") == "kept"]
    if not kept:
        return ""
    return f" Kept before: {', '.join(kept)}."


def loss_sentence(facts: LossFacts) -> str:
    """One loss in words, for those who do not see the picture."""
    reading = facts.reading
    if reading.get("reason"):
        return f"Not measured: {reading['reason']}."
    ends = [reading.get(key) for key in ("difference", "lower", "upper")]
    used = f"{number(reading.get('num_used'))} of {number(reading.get('num_groups'))} groups"
    used += f" ({number(reading.get('tokens_used'))} tokens)"
    how = f"{reading.get('method')} on {used}; effective sample {number(reading.get('effective_size'))}"
    if not all(isinstance(end, int | float) and math.isfinite(end) for end in ends):
        why = reading.get("undecided") or "the interval has no end"
        return f"Undecided: {why}. {how}."
    unit = " nats per token" if reading.get("metric") == "nll" else ""
    confidence = reading.get("confidence")
    sure = f"{percent(confidence)} interval" if isinstance(confidence, int | float) else "interval"
    tail = f" Undecided: {reading['undecided']}." if reading.get("undecided") else ""
    return (
        f"from {number(reading.get('before'), 4)} to {number(reading.get('after'), 4)}{unit}; difference "
        f"{number(ends[0])}, {sure} {number(ends[1])} to {number(ends[2])}, by {how}.{tail}"
    )


# -- policy ----------------------------------------------------------------------------------------


def _overrides(predicate: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Cells of the policy that the user replaced, with their values: those whose source is `user`."""
    resolved = (predicate.get("policy") or {}).get("resolved") or {}
    found = []
    for key, source in sorted((resolved.get("sources") or {}).items()):
        if source == "user":
            found.append((key, _value_at(resolved, key)))
    return tuple(found)


def _value_at(resolved: Mapping[str, Any], key: str) -> str:
    group, _, rest = key.partition(".")
    guard, _, name = rest.partition(".")
    value = resolved.get(group, {}).get(guard)
    if name and isinstance(value, Mapping):
        value = value.get(name)
    if isinstance(value, Mapping):
        return ", ".join(f"{family} {number(item)}" for family, item in value.items())
    return number(value) if isinstance(value, int | float) else str(value)
