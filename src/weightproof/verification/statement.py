"""Level 1, the certificate alone: signature, form, and everything in it that follows from something else in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from weightproof.certificate import Certificate
from weightproof.certifying.form import Content, StepForm
from weightproof.folders.jsonable import json_digest, to_jsonable
from weightproof.policy import decision_digest, evidence_digest
from weightproof.signing import key_id, verify_envelope
from weightproof.snapshots.tensor_store import model_digest
from weightproof.types import Action, Readings
from weightproof.verification.coherence import check_coherence
from weightproof.verification.result import Findings

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


def check_signature(
    certificate: Certificate, keys: Sequence[Ed25519PublicKey], findings: Findings, *, unsigned_ok: bool
) -> tuple[str, ...]:
    """Whether one of the trusted keys signed; ids of those that did.

    Without a key nobody vouches for the certificate, whatever its envelope claims: unless that is accepted on
    purpose, the answer cannot be VALID.
    """
    if keys:
        signed_by = () if certificate.envelope is None else verify_envelope(certificate.envelope, keys)
        if signed_by:
            findings.checked.append(f"signature of {', '.join(one[:16] for one in signed_by)}")
        else:
            claimed = "claims of " + ", ".join(one[:16] for one in certificate.signatures) + ", none of which fits"
            trusted = " or ".join(key_id(key)[:16] for key in keys)
            found = claimed if certificate.is_signed else "no signature"
            findings.differs("signature", "by a trusted key", f"a valid signature of {trusted}", found)
        return signed_by
    said = "nobody vouches for this certificate: no public key was given to check its signature with"
    if not certificate.is_signed:
        said = "nobody vouches for this certificate: it is not signed"
    if unsigned_ok:
        findings.notes.append(said)
    else:
        findings.unchecked.append(f"{said} (give the signer's public key, or accept that with --unsigned-ok)")
    return ()


def check_statement(content: Content, findings: Findings) -> None:
    """Everything in the certificate that can be computed from the rest of it."""
    _check_policy(content, findings)
    _check_digests(content, findings)
    _check_decision(content, findings)
    for index, step in enumerate(content.predicate.steps):
        _check_step(content, index, step, findings)
    check_coherence(content, findings)
    findings.checked.append("digests and references inside the certificate")


def _check_policy(content: Content, findings: Findings) -> None:
    policy = content.predicate.policy
    findings.require_stated("policy", "digest", json_digest(policy.resolved), policy.digest)
    findings.require_stated("policy", "name", str(policy.resolved.get("name")), policy.name)


def _check_digests(content: Content, findings: Findings) -> None:
    certificate, predicate = content.certificate, content.predicate
    findings.require_stated(
        "subject", "digest of its tensors", model_digest(certificate.tensors), certificate.model_digest
    )
    for name, readings in content.readings.items():
        stated = {tensor: reading.digest for tensor, reading in readings.tensors.items()}
        findings.require_stated(f"readings {name}", "model_digest", model_digest(stated), readings.model_digest)
    findings.require_stated("baseline", "model_digest", content.baseline.model_digest, predicate.baseline.model_digest)
    _compare_digests("subject", certificate.tensors, content.subject, findings)
    _compare_digests("baseline", predicate.baseline.tensors, content.baseline, findings)


def _compare_digests(side: str, stated: Mapping[str, str], readings: Readings, findings: Findings) -> None:
    """The digests of tensors that are stated beside readings are those of the readings."""
    for name in sorted(stated.keys() & readings.tensors.keys()):
        findings.require_stated(f"{side} {name}", "digest", readings.tensors[name].digest, stated[name])
    if side == "subject" or stated:
        for name in sorted(stated.keys() ^ readings.tensors.keys()):
            has = "its readings" if name in readings.tensors else "its list of tensors"
            findings.differs(f"{side} {name}", "tensor", "in its list of tensors and its readings", f"in {has} only")


def _check_decision(content: Content, findings: Findings) -> None:
    """The decision on top is that of the newest step, and that step is about this subject."""
    predicate = content.predicate
    decision, steps = predicate.decision, predicate.steps
    if decision is None or not steps:
        findings.require_stated("decision", "steps", bool(steps), decision is not None)
        return
    last, index = steps[-1], len(steps) - 1
    findings.require_stated("decision", "index", index, decision.index)
    findings.require_stated("decision", "step", last.name, decision.step)
    findings.require_stated("assurance", "of the newest step", str(last.assurance), str(predicate.assurance))
    for name in ("applied", "action", "situation", "reason", "warned", "decision_digest", "evidence_digest"):
        findings.require_stated("decision", name, _value(getattr(last, name)), _value(getattr(decision, name)))
    findings.require_stated("policy", "digest in the newest step", predicate.policy.digest, last.policy_digest)
    # A window of training may be kept for the time being: the subject is the last state that was accepted.
    lasting = last.applied != "restored" and last.kind != "train"
    if lasting and last.judged_on is not None and last.judged_on.after != "subject":
        findings.differs("decision", "readings", "those of the subject", f"those of {last.judged_on.after}")


def _value(value: object) -> str | bool | None:
    return value if isinstance(value, bool) or value is None else str(value)


def _check_step(content: Content, index: int, step: StepForm, findings: Findings) -> None:
    where = f"step {index} ({step.name})"
    if step.complete:
        decision = step.decision
        findings.require_stated(where, "evidence_digest", evidence_digest(decision), step.evidence_digest)
        findings.require_stated(where, "decision_digest", decision_digest(decision), step.decision_digest)
        for verdict in step.verdicts:
            count = len(verdict.measurements)
            findings.require_stated(f"{where}, {verdict.guard}", "num_measurements", count, verdict.num_measurements)
    if step.judged_on is None:
        return
    findings.require_stated(where, "complete", True, step.complete)
    after, reference = content.readings[step.judged_on.after], content.readings[step.judged_on.reference]
    for name, stated, read in (
        ("record", step.record, after.edit),
        ("divergence", step.divergence, after.divergence),
        ("losses", step.losses, after.losses),
    ):
        findings.require_stated(where, name, json_digest(read), json_digest(stated))
    if step.record is not None:
        findings.require_stated(where, "kind", step.record.kind, step.kind)
        findings.require_stated(where, "digest_after", after.model_digest, step.record.digest_after)
        if not step.record.stray_names:
            findings.require_stated(where, "digest_before", reference.model_digest, step.record.digest_before)
    known = {windows.digest for windows in content.predicate.windows}
    for reading in after.divergence:
        if reading.windows_digest not in known:
            findings.differs(where, f"windows {reading.windows}", "listed in windows", reading.windows_digest)


def check_policy_is(content: Content, expected: object, findings: Findings) -> None:
    """The certificate was judged by the policy that the verifier demands."""
    digest, name = json_digest(expected), to_jsonable(expected)["name"]
    stated = content.predicate.policy
    if digest != stated.digest:
        findings.differs("policy", "as demanded", f"{name} ({digest[:16]})", f"{stated.name} ({stated.digest[:16]})")


def check_parent(content: Content, parent: Certificate | None, findings: Findings) -> None:
    """The certificate goes on from `parent`: by its digest, and from the very model that it is about."""
    stated = content.predicate.parent
    if parent is None:
        if stated is not None:
            findings.notes.append(
                f"it goes on from certificate {stated.sha256[:16]}, which was not given to be checked"
            )
        return
    findings.require_stated("parent", "digest", parent.digest, None if stated is None else stated.sha256)
    base, theirs = content.baseline.tensors, parent.tensors
    differing = sorted(name for name in base if base[name].digest != theirs.get(name))
    transient = set(content.predicate.transient)
    for name in [one for one in differing if one in theirs or one not in transient][:5]:
        findings.differs(f"parent {name}", "digest", theirs.get(name), base[name].digest)
    last = parent.predicate.get("decision")
    if isinstance(last, Mapping) and last.get("action") != str(Action.KEEP) and last.get("applied") != "restored":
        findings.notes.append(f"the parent certificate itself says {last.get('action')}")
    findings.checked.append("the parent certificate")
