"""The case file: everything a certificate says of one model, before it is written down as a statement.

A session makes one of its history, `certify` one of two folders; `statement_of` is the only place that
gives them the form of docs/certificate-format.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weightproof.certificate import Certificate
from weightproof.errors import InputError
from weightproof.folders.jsonable import json_digest, to_jsonable
from weightproof.judgement.judging import Judged
from weightproof.policy import Policy
from weightproof.readings.readings_json import readings_json
from weightproof.snapshots.tensor_store import model_digest
from weightproof.types import Assurance, Readings

BASELINE = "baseline"
SUBJECT = "subject"


@dataclass(frozen=True, kw_only=True)
class Base:
    """What the subject is compared with.

    Attributes:
        readings: Of the base, all of them.
        created_at: When they were taken, ISO 8601.
        environment: Versions that shaped them.
        name: Of the folder or model class.
        files: Relative path -> SHA-256 where it is a folder.
        tensors: Name as stored -> tensor digest; empty where it is the same as in `readings`.
    """

    readings: Readings
    created_at: str
    environment: Mapping[str, str]
    name: str = ""
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    tensors: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, kw_only=True)
class CaseFile:
    """Everything that is stated of one model.

    Attributes:
        subject_name: Name of the model: its class, or its folder.
        tensors: Name as stored -> `tensor_store.tensor_digest`; of a model in memory its public names.
        baseline: What it is compared with.
        current: Readings of the subject.
        policy: The resolved policy.
        windows: Name, digest, number of tokens of each set of windows, and under `made` how it was made.
        steps: Every judged step, oldest first, as `evidence.step_json` gives it; the last one is the decision.
        judged: Place in `steps` -> the readings that its decision was made from. None: the only step was made
            from `baseline` and `current`.
        environment: Versions that shape the numbers.
        created_at: ISO 8601.
        files: Relative path -> SHA-256 of the subject's files; empty for a model in memory.
        ties: Other names of a stored tensor, by its name: a file may hold it under one of these.
        transient: Names of tensors that a model in memory has and no file holds (non-persistent buffers).
        world_size: Processes that took part.
        differing_ranks: Tensor -> ranks whose copy is not that of rank 0.
        cost: Seconds and bytes, by what they were spent on.
        not_tested: What nobody measured, in sentences.
        parent: Digest of the certificate of the base, where it has one.
    """

    subject_name: str
    tensors: Mapping[str, str]
    baseline: Base
    current: Readings
    policy: Policy
    windows: Sequence[Mapping[str, Any]]
    steps: Sequence[Mapping[str, Any]]
    environment: Mapping[str, str]
    created_at: str
    judged: Mapping[int, Judged] | None = None
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    ties: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    transient: Sequence[str] = ()
    world_size: int = 1
    differing_ranks: Mapping[str, Sequence[int]] = field(default_factory=dict[str, Sequence[int]])
    cost: Mapping[str, Any] = field(default_factory=dict[str, Any])
    not_tested: Sequence[str] = ()
    parent: str | None = None


def statement_of(case: CaseFile) -> Certificate:
    """The certificate, version 1, of a case.

    Raises:
        InputError: If the case has several steps and does not say what each was judged from, or holds something
            that has no JSON form.
    """
    table = _ReadingsTable(case)
    steps = [_step(case, index, step, table) for index, step in enumerate(case.steps)]
    base = case.baseline
    predicate = {
        "created_at": case.created_at,
        "environment": case.environment,
        "world_size": case.world_size,
        "decision": _decision(steps),
        "assurance": steps[-1]["assurance"] if steps else str(Assurance.NONE),
        "policy": {"name": case.policy.name, "digest": case.policy.digest, "resolved": case.policy},
        "baseline": {
            "name": base.name,
            "model_digest": base.readings.model_digest,
            "created_at": base.created_at,
            "environment": base.environment,
            "files": base.files,
            "tensors": base.tensors,
        },
        "ties": case.ties,
        "transient": sorted(case.transient),
        "differing_ranks": case.differing_ranks,
        "windows": case.windows,
        "steps": steps,
        "not_tested": list(case.not_tested),
        "cost": case.cost,
        "parent": None if case.parent is None else {"sha256": case.parent},
    }
    return Certificate.build(
        subject_name=case.subject_name,
        model_digest=model_digest(case.tensors),
        predicate={**to_jsonable(predicate), "readings": table.content},
        files=case.files,
        tensors=case.tensors,
    )


class _ReadingsTable:
    """Readings by name, each of them once."""

    def __init__(self, case: CaseFile) -> None:
        self.content: dict[str, Any] = {}
        self._names: dict[str, str] = {}
        self.name_of(BASELINE, case.baseline.readings)
        # Always there under its own name: a reader must not search for it.
        self.content[SUBJECT] = readings_json(case.current)
        self._names.setdefault(json_digest(self.content[SUBJECT]), SUBJECT)

    def name_of(self, wanted: str, readings: Readings) -> str:
        """The name under which some readings stand, `wanted` where they are new."""
        content = readings_json(readings)
        name = self._names.setdefault(json_digest(content), wanted)
        if name == wanted:
            self.content[name] = content
        return name


def _step(case: CaseFile, index: int, step: Mapping[str, Any], table: _ReadingsTable) -> dict[str, Any]:
    """A step with the names of the readings that it was judged from, where they are at hand."""
    judged = _judged(case).get(index)
    record = step.get("record") or {}
    # Of a run resumed from an older version, which wrote fewer fields.
    older = {"kind": record.get("kind", "unknown"), "policy_digest": "", "complete": False}
    step = {**older, "divergence": [], "losses": [], **step}
    if judged is None:
        return {**step, "judged_on": None}
    sides = {side: getattr(judged, side) for side in ("before", "reference", "after")}
    return {**step, "judged_on": {side: table.name_of(f"step-{index}-{side}", sides[side]) for side in sides}}


def _judged(case: CaseFile) -> Mapping[int, Judged]:
    if case.judged is not None:
        return case.judged
    if len(case.steps) > 1:
        raise InputError("a case with several steps must say from which readings each was judged (judged=)")
    return {0: Judged(case.baseline.readings, case.baseline.readings, case.current)}


def _decision(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The newest decision, with the step it was about: after a rollback the subject is the state before that step."""
    if not steps:
        return None
    last = steps[-1]
    copied = ("applied", "action", "situation", "reason", "warned", "decision_digest", "evidence_digest")
    return {"step": last["name"], "index": len(steps) - 1, **{name: last[name] for name in copied}}
