"""Verify a certificate against the weights, at three levels, and answer with the differences.

| level | needs | what is checked |
| --- | --- | --- |
| 1 | certificate, folder, public key | signature, form, every digest inside the certificate, every file and tensor |
| 2 | and, better, the base | readings taken again from the weights; verdicts and decision judged again from them |
| 3 | the base and the data | outputs and losses computed again by running both models |

VALID means that the certificate says what is true, not that the change was kept: that is its `action`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from weightproof import kinds
from weightproof.certificate import Certificate
from weightproof.certifying.certification import TRAINING, Request, certify_folders
from weightproof.certifying.comparison import compare_folders, read_folder
from weightproof.certifying.form import Content, StepForm, content_of
from weightproof.certifying.model_pair import Data
from weightproof.deltas import Delta
from weightproof.errors import InputError, WeightproofError
from weightproof.lora.adapters import Adapter
from weightproof.policy import Policy
from weightproof.types import EditRecord, Readings
from weightproof.verification.folder import check_base_files, check_folder
from weightproof.verification.kind import adapters_at_hand, compare_merge, delta_digest, kind_of
from weightproof.verification.outputs import compare_outputs
from weightproof.verification.readings import compare_readings, compare_records
from weightproof.verification.result import Difference, Findings, Status, Verification
from weightproof.verification.statement import check_parent, check_policy_is, check_signature, check_statement
from weightproof.verification.verdicts import check_verdicts, policy_of

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

__all__ = ["Demands", "Difference", "Status", "Verification", "verify"]

LEVELS = (1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Demands:
    """What a verifier trusts and demands beside the certificate and the folder.

    Attributes:
        keys: Public keys; one of them must have signed.
        unsigned_ok: Accept that nobody vouches for the certificate.
        policy: The policy that must have decided; None: whichever is in the certificate.
        parent: The certificate that it must go on from.
        resharded: Accept weights in other files, tensor for tensor the same.
        base: Folder of the model before the change.
        data: What outputs and losses are computed on at level 3.
        adapters: What a merge put into the weights: folders that PEFT wrote, or adapters that were read; several in the
            order in which they were merged at once. Where a model was steered: the path of the delta.
        skip: Files of the folder that are no part of the model, such as the certificate.
    """

    keys: Sequence[Ed25519PublicKey] = ()
    unsigned_ok: bool = False
    policy: Policy | None = None
    parent: Certificate | None = None
    resharded: bool = False
    base: Path | None = None
    data: Data = field(default_factory=Data)
    adapters: Sequence[Adapter | Path | str] = ()
    skip: Sequence[Path] = ()


def verify(
    certificate: Certificate | Path | str,
    folder: Path | str,
    level: int = 1,
    demands: Demands | None = None,
    *,
    progress: bool = False,
) -> Verification:
    """Verify a certificate against a model folder.

    Args:
        certificate: The certificate, or its file (which is then no part of the model).
        folder: The model folder that it is said to be about.
        level: 1, 2 or 3.
        demands: Trusted keys, base folder, data and what else is demanded; None: nothing.
        progress: Show bars where somebody watches a terminal.

    Raises:
        InputError: If the certificate cannot be read at all, or a folder is missing, unsafe or unusable.
    """
    demands = demands or Demands()
    if level not in LEVELS:
        raise InputError(f"level must be 1, 2 or 3, not {level!r}")
    if isinstance(certificate, Certificate):
        skip = tuple(demands.skip)
    else:
        skip = (*demands.skip, Path(certificate))
        certificate = Certificate.load(certificate)
    findings = Findings()
    signed_by = check_signature(certificate, demands.keys, findings, unsigned_ok=demands.unsigned_ok)
    content = _content(certificate, findings)
    if content is not None:
        run = _Run(content, Path(folder), demands, findings, progress)
        run.first(skip)
        if level > 1 and run.is_readable:
            run.further(level)
    decision = certificate.predicate.get("decision")
    return Verification(
        findings=findings,
        level=level,
        signed_by=signed_by,
        certificate_digest=certificate.digest,
        subject=certificate.subject_name,
        action=str(decision["action"]) if isinstance(decision, dict) and "action" in decision else None,
    )


def _content(certificate: Certificate, findings: Findings) -> Content | None:
    """The certificate in types; None where its form is wrong, which is a difference."""
    try:
        return content_of(certificate)
    except InputError as error:
        where, _, what = str(error).partition(": ")
        findings.differs(where, "form", "as in the schema of version 1", what)
        return None


class _Run:
    """One verification of one folder."""

    def __init__(self, content: Content, folder: Path, demands: Demands, findings: Findings, progress: bool) -> None:
        self.content, self.folder, self.demands = content, folder, demands
        self.findings, self.progress = findings, progress
        self.is_readable = False
        self.adapter: Adapter | Delta | None = None

    def first(self, skip: Sequence[Path]) -> None:
        """Level 1."""
        check_statement(self.content, self.findings)
        if self.demands.policy is not None:
            check_policy_is(self.content, self.demands.policy, self.findings)
        check_parent(self.content, self.demands.parent, self.findings)
        self.adapter = adapters_at_hand(self.content, self.demands.adapters, self.findings)
        resharded = self.demands.resharded
        self.is_readable = check_folder(self.content, self.folder, self.findings, skip=skip, resharded=resharded)

    def further(self, level: int) -> None:
        """Level 2, and 3 where it is asked for and the folder is the one of the certificate."""
        already = len(self.findings.differences)
        check_verdicts(self.content, self.findings)
        try:
            policy = policy_of(self.content)
            if level == 3 and self.demands.base is not None and not already:
                self._outputs(policy, self.demands.base)
            else:
                self._weights(policy)
        except WeightproofError as error:
            if not self.findings.differences:
                raise
            self.findings.notes.append(f"not verified further: {str(error).splitlines()[0]}")
            return
        if level == 3 and self.demands.base is None:
            self._no_base()
        elif level == 3 and already:
            self.findings.notes.append("nothing was run: the folder or the certificate differs already")

    def _no_base(self) -> None:
        if self.content.subject.divergence or self.content.subject.losses:
            self.findings.unchecked.append("outputs and losses: they compare the subject with its base: give --base")

    def _weights(self, policy: Policy) -> None:
        base = self.demands.base
        if base is None:
            found = read_folder(self.folder, progress=self.progress).readings
            self._hold("subject", self.content.subject, found)
            self.findings.checked.append("readings of the subject's weights")
            self.findings.notes.append(
                "the readings of the base were taken from the certificate: give --base to take them again"
            )
            return
        record = self._record()
        targets = None if record is None else record.targets
        kind = kind_of(record, self.adapter, self.content.predicate.ties)
        found = compare_folders(base, self.folder, policy, kind=kind, targets=targets, progress=self.progress)
        self._compare(found.before, found.after)

    def _outputs(self, policy: Policy, base: Path) -> None:
        record = self._record()
        kind = kind_of(record, self.adapter, self.content.predicate.ties)
        request = Request(
            base=base,
            subject=self.folder,
            policy=policy,
            kind=None if kind == kinds.Plain(TRAINING) else kind,
            targets=None if record is None else record.targets,
            data=self.demands.data,
        )
        certified = certify_folders(request, progress=self.progress)
        self._compare(certified.case.baseline.readings, certified.case.current)
        compare_outputs(self.content, certified, self.findings)

    def _hold(self, side: str, stated: Readings, found: Readings) -> None:
        """Readings of one folder against those stated; in training not all of them are taken."""
        in_training = any(step.kind == TRAINING for step in self.content.predicate.steps)
        of_files = bool(self.content.certificate.files)
        compare_readings(side, stated, found, self.findings, of_files=of_files, whole=not in_training)

    def _compare(self, before: Readings, after: Readings) -> None:
        """Readings of both folders, and what changed between them."""
        self._require_base(before)
        self._hold("baseline", self.content.baseline, before)
        self._hold("subject", self.content.subject, after)
        self.findings.checked.append("readings of the weights of base and subject")
        step = self._step()
        if step is None or step.record is None or step.judged_on is None or after.edit is None:
            return
        reference = self.content.readings[step.judged_on.reference]
        if reference.model_digest != self.content.baseline.model_digest:
            self.findings.unchecked.append(
                f"what {step.name!r} changed: it began from a state between base and subject, which is not at hand"
            )
            return
        stated, found = step.record, after.edit
        if found.kind != stated.kind and stated.kind not in kinds.PLAIN_NAMES:  # those promise nothing of a matrix
            self.findings.unchecked.append(
                f"the contract of {stated.kind!r}: what it was given is not in the certificate{_how_to_give(stated)}"
            )
            found = _without_contract(found)
        elif found.kind == kinds.LoraMerge.name:
            compare_merge(f"what {step.name!r} changed", stated, found, self.findings)
        compare_records(f"what {step.name!r} changed", stated, found, self.findings)

    def _require_base(self, before: Readings) -> None:
        """Every file and tensor of the baseline is in the base folder, where it is not one that no file holds."""
        stated_files = self.content.predicate.baseline.files
        if stated_files and self.demands.base is not None:
            check_base_files(stated_files, self.demands.base, self.findings, resharded=self.demands.resharded)
        ties = self.content.predicate.ties
        for name, reading in self.content.baseline.tensors.items():
            there = next((before.tensors[n] for n in (name, *ties.get(name, ())) if n in before.tensors), None)
            if there is not None:
                self.findings.require_equal(f"tensor {name} of the base", "digest", reading.digest, there.digest)
            elif name not in self.content.predicate.transient:
                self.findings.differs(f"tensor {name} of the base", "digest", reading.digest, None)

    def _step(self) -> StepForm | None:
        """The step that made the subject."""
        steps = self.content.predicate.steps
        return next((one for one in reversed(steps) if one.judged_on and one.judged_on.after == "subject"), None)

    def _record(self) -> EditRecord | None:
        step = self._step()
        return None if step is None else step.record


def _how_to_give(record: EditRecord) -> str:
    if delta_digest(record) is not None:
        return ": give that very delta with --adapter"
    named = record.kind == kinds.LoraMerge.name and isinstance(record.params.get("adapter"), str)
    return ": give that very adapter with --adapter" if named else ""


def _without_contract(record: EditRecord) -> EditRecord:
    return replace(record, contract=())
