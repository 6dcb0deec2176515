"""What the predicate of a certificate holds, as types: the schema, and what a verifier reads it into.

`docs/certificate-format.md` says what the fields mean; `schema` is the same as a JSON schema, which is shipped.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from weightproof.certificate import PREDICATE_TYPE, STATEMENT_TYPE, Certificate
from weightproof.errors import InputError
from weightproof.readings.readings_json import ORDERED, fields_of, from_jsonable, readings_of
from weightproof.types import (
    Action,
    Assurance,
    Decision,
    DivergenceReading,
    EditRecord,
    LossReading,
    Measurement,
    Outcome,
    Readings,
    Verdict,
)

Names = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VerdictForm:
    """One guard's verdict; `measurements` are all of them where the step is complete."""

    guard: str
    outcome: Outcome
    reason: str
    num_measured: int
    num_eligible: int
    measurements: tuple[Measurement, ...]
    num_measurements: int

    @property
    def verdict(self) -> Verdict:
        """The noun."""
        return Verdict(self.guard, self.outcome, self.measurements, self.reason, self.num_measured, self.num_eligible)


@dataclass(frozen=True, slots=True)
class JudgedOn:
    """Names in `readings` of what a decision was made from."""

    before: str
    reference: str
    after: str


@dataclass(frozen=True, slots=True)
class StepForm:
    """One judged step; `spectra` are for pictures: nothing is decided by them."""

    name: str
    step: int
    kind: str
    action: Action
    applied: str | None
    situation: str
    reason: str
    warned: bool
    monitor: bool
    assurance: Assurance
    policy_digest: str
    decision_digest: str
    evidence_digest: str
    world_size: int
    seconds: float
    complete: bool
    record: EditRecord | None
    divergence: tuple[DivergenceReading, ...]
    losses: tuple[LossReading, ...]
    verdicts: tuple[VerdictForm, ...]
    reported: tuple[Measurement, ...]
    judged_on: JudgedOn | None
    spectra: tuple[Mapping[str, object], ...] = ()

    @property
    def decision(self) -> Decision:
        """The decision as it stands in the certificate, with the digests that stand there."""
        return Decision(
            action=self.action,
            situation=self.situation,
            reason=self.reason,
            warned=self.warned,
            assurance=self.assurance,
            verdicts=tuple(one.verdict for one in self.verdicts),
            reported=self.reported,
            step=self.step,
            world_size=self.world_size,
            policy_digest=self.policy_digest,
            digest=self.decision_digest,
            evidence_digest=self.evidence_digest,
        )


@dataclass(frozen=True, slots=True)
class DecisionForm:
    """The last decision in short; all of it is in its step."""

    step: str
    index: int
    applied: str | None
    action: Action
    situation: str
    reason: str
    warned: bool
    decision_digest: str
    evidence_digest: str


@dataclass(frozen=True, slots=True)
class PolicyForm:
    """The policy; `digest` is the SHA-256 of the RFC 8785 JSON of `resolved`."""

    name: str
    digest: str
    resolved: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class WindowsForm:
    """One set of windows and how it was made."""

    name: str
    digest: str
    num_tokens: int
    made: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class BaselineForm:
    """What the subject is compared with; its readings are `readings.baseline`."""

    name: str
    model_digest: str
    created_at: str
    environment: Mapping[str, str]
    files: Mapping[str, str]
    tensors: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ParentForm:
    """The certificate that this one goes on from: SHA-256 of its canonical statement."""

    sha256: str


@dataclass(frozen=True, slots=True)
class PredicateForm:
    """The predicate. `readings` maps names to readings; `baseline` and `subject` are always among them."""

    created_at: str
    environment: Mapping[str, str]
    world_size: int
    decision: DecisionForm | None
    assurance: Assurance
    policy: PolicyForm
    baseline: BaselineForm
    ties: Mapping[str, Names]
    transient: Names
    differing_ranks: Mapping[str, tuple[int, ...]]
    windows: tuple[WindowsForm, ...]
    steps: tuple[StepForm, ...]
    not_tested: Names
    cost: Mapping[str, object]
    parent: ParentForm | None
    readings: Mapping[str, object]


@dataclass(frozen=True)
class Content:
    """A certificate in types."""

    certificate: Certificate
    predicate: PredicateForm
    readings: Mapping[str, Readings]

    @property
    def subject(self) -> Readings:
        """Readings of the subject."""
        return self.readings["subject"]

    @property
    def baseline(self) -> Readings:
        """Readings of the baseline."""
        return self.readings["baseline"]


def content_of(certificate: Certificate) -> Content:
    """The certificate in types.

    Raises:
        InputError: Naming the path of what is missing, unknown, or of another kind.
    """
    form = from_jsonable(PredicateForm, certificate.predicate, "predicate")
    readings = {name: readings_of(one, f"predicate.readings[{name!r}]") for name, one in form.readings.items()}
    named = {"baseline", "subject"} | {
        name for step in form.steps if step.judged_on for name in dataclasses.astuple(step.judged_on)
    }
    for name in sorted(named - readings.keys()):
        raise InputError(f"predicate.readings[{name!r}]: these readings are missing")
    return Content(certificate, form, readings)


# ---------------------------------------------------------------- JSON schema


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a statement, made from the types."""
    definitions: dict[str, Any] = {}
    predicate = _schema(PredicateForm, definitions)
    readings = _schema(Readings, definitions)
    order = {path: {"type": "array", "items": {"type": "string"}} for path in ORDERED}
    definitions["Readings"]["properties"]["order"] = {
        "type": "object",
        "properties": order,
        "additionalProperties": False,
    }
    definitions["PredicateForm"]["properties"]["readings"] = {
        "type": "object",
        "required": ["baseline", "subject"],
        "additionalProperties": readings,
    }
    hexadecimal = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
    descriptor = _closed(
        {
            "name": {"type": "string"},
            "digest": _closed({"sha256": hexadecimal}),
            "annotations": _closed({"kind": {"enum": ["model", "file", "tensor"]}}),
        }
    )
    statement = {
        "_type": {"const": STATEMENT_TYPE},
        "subject": {"type": "array", "minItems": 1, "items": descriptor},
        "predicateType": {"const": PREDICATE_TYPE},
        "predicate": predicate,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": PREDICATE_TYPE,
        "title": "weightproof certificate, version 1: the in-toto Statement",
        **_closed(statement),
        "$defs": dict(sorted(definitions.items())),
    }


def _closed(properties: Mapping[str, Any], required: typing.Iterable[str] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": sorted(properties if required is None else required),
        "additionalProperties": False,
    }


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    if kind is object or kind is Any:
        return {}
    if dataclasses.is_dataclass(kind):
        return _reference(kind, definitions)
    if isinstance(kind, type) and kind in _PLAIN:
        return dict(_PLAIN[kind])
    if isinstance(kind, type) and issubclass(kind, Enum):
        return {"enum": [member.value for member in kind]}
    return _CONTAINERS[typing.get_origin(kind)](typing.get_args(kind), definitions)


def _reference(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    name = kind.__name__
    if name not in definitions:
        definitions[name] = {}
        fields = fields_of(kind)
        needed = [field for field, (_, optional) in fields.items() if not optional]
        found = {field: _schema(hint, definitions) for field, (hint, _) in fields.items()}
        definitions[name] = _closed(found, needed)
    return {"$ref": f"#/$defs/{name}"}


_PLAIN: Mapping[Any, Mapping[str, Any]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": "^-?[0-9]+$"}]},
    float: {"anyOf": [{"type": "number"}, {"enum": ["NaN", "Infinity", "-Infinity"]}]},
}


def _optional(of: tuple[Any, ...], definitions: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [{"type": "null"}, _schema(next(one for one in of if one is not types.NoneType), definitions)]}


def _array(of: tuple[Any, ...], definitions: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": _schema(of[0], definitions)}


def _map(of: tuple[Any, ...], definitions: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": _schema(of[1], definitions)}


_CONTAINERS: Mapping[Any, Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any]]] = {
    types.UnionType: _optional,
    typing.Union: _optional,
    tuple: _array,
    frozenset: _array,
    Mapping: _map,
}
