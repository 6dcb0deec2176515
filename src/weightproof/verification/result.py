"""What a verification answers: differences, what could not be checked, and the status they add up to."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from weightproof.folders.jsonable import to_jsonable


class Status(StrEnum):
    """VALID: everything asked for was checked and holds. UNDECIDED: nothing is wrong, but something is unchecked."""

    VALID = "valid"
    INVALID = "invalid"
    UNDECIDED = "undecided"


Value = str | float | int | bool | None


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as the certificate says.

    Attributes:
        where: The file, tensor, matrix, step or field.
        what: The digest or statistic, or what is wrong.
        expected: What the certificate states, or the verifier demands; None where a thing must not be there.
        found: What lies in the folder, or was computed here.
    """

    where: str
    what: str
    expected: Value
    found: Value

    def __str__(self) -> str:
        """One line."""
        return f"{self.where}: {self.what}: expected {_shown(self.expected)}, found {_shown(self.found)}"


def _shown(value: Value) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, float):
        return f"{value:.9g}"
    text = str(value)
    is_digest = len(text) == 64 and all(character in "0123456789abcdef" for character in text)
    return f"{text[:16]}…" if is_digest else text


@dataclass
class Findings:
    """What the parts of a verification gather.

    Attributes:
        differences: What is not as stated.
        unchecked: What was asked for and could not be checked, and why.
        checked: What was checked.
        notes: What a reader must know beside.
    """

    differences: list[Difference] = field(default_factory=list[Difference])
    unchecked: list[str] = field(default_factory=list[str])
    checked: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])

    def differs(self, where: str, what: str, expected: Value, found: Value) -> None:
        """Note one difference."""
        self.differences.append(Difference(where, what, expected, found))

    def misstated(self, where: str, what: str, computed: Value, stated: Value) -> None:
        """Note that something stated is not what was computed."""
        self.differs(where, what, stated, computed)

    def require_stated(self, where: str, what: str, computed: Value, stated: Value) -> None:
        """Note a difference where something stated is not what was computed."""
        if computed != stated:
            self.misstated(where, what, computed, stated)

    def require_equal(self, where: str, what: str, expected: Value, found: Value) -> None:
        """Note a difference where two values are not equal."""
        if expected != found:
            self.differs(where, what, expected, found)


@dataclass(frozen=True)
class Verification:
    """The answer.

    Attributes:
        level: How far it went: 1 digests and signature, 2 weights and verdicts, 3 outputs and losses.
        findings: What was found.
        signed_by: Ids of the given keys that signed it.
        certificate_digest: SHA-256 of the statement.
        subject: Name of the model.
        action: The decision in the certificate: what was decided is not what is verified.
    """

    level: int
    findings: Findings
    signed_by: tuple[str, ...]
    certificate_digest: str
    subject: str
    action: str | None

    @property
    def differences(self) -> tuple[Difference, ...]:
        """What is not as stated; empty unless INVALID."""
        return tuple(self.findings.differences)

    @property
    def unchecked(self) -> tuple[str, ...]:
        """What was asked for and could not be checked, and why."""
        return tuple(self.findings.unchecked)

    @property
    def checked(self) -> tuple[str, ...]:
        """What was checked."""
        return tuple(self.findings.checked)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know beside."""
        return tuple(self.findings.notes)

    @property
    def status(self) -> Status:
        """INVALID where anything differs, UNDECIDED where anything is unchecked, else VALID."""
        if self.differences:
            return Status.INVALID
        return Status.UNDECIDED if self.unchecked else Status.VALID

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "status": str(self.status),
            "level": self.level,
            "subject": self.subject,
            "action": self.action,
            "certificate": self.certificate_digest,
            "signed_by": list(self.signed_by),
            "differences": [to_jsonable(one) for one in self.differences],
            "unchecked": list(self.unchecked),
            "checked": list(self.checked),
            "notes": list(self.notes),
        }
