"""The certificate: an in-toto Statement over the weights, with the evidence behind each decision.

A file holds the bare statement, or a DSSE envelope around it when it was signed (`weightproof.signing`).
`digest` is the SHA-256 of the statement's RFC 8785 JSON: it depends neither on the order of keys nor on
white space nor on who signed. The format is described in docs/certificate-format.md.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import rfc8785

from weightproof.errors import InputError
from weightproof.folders.files import write_atomically
from weightproof.signing import Envelope, sign

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:weightproof:certificate:v1"
TENSOR = "tensor:"
"""Prefix of the subjects that are tensors."""

_OURS = re.compile(r"urn:weightproof:certificate:v(\d+)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_BYTES = 1 << 30
_MAX_DEPTH = 64
_EXPECTED: Mapping[str, type | tuple[type, ...]] = {
    "environment": dict,
    "policy": dict,
    "baseline": dict,
    "readings": dict,
    "windows": list,
    "steps": list,
    "not_tested": list,
    "cost": dict,
}


@dataclass(frozen=True)
class Certificate:
    """One statement, with the envelope it was read from. `Certificate.from_json(c.to_json()) == c`."""

    statement: Mapping[str, Any]
    envelope: Envelope | None = field(default=None, compare=False)

    @classmethod
    def build(
        cls,
        *,
        subject_name: str,
        model_digest: str,
        predicate: Mapping[str, Any],
        files: Mapping[str, str] | None = None,
        tensors: Mapping[str, str] | None = None,
    ) -> Certificate:
        """A statement that `predicate` holds for the model with this digest.

        Args:
            subject_name: Name of the model.
            model_digest: SHA-256 (hex) over the names and digests of its tensors (`tensor_store.model_digest`).
            predicate: The evidence; JSON types.
            files: Relative path -> SHA-256 (hex).
            tensors: Name as stored -> digest (hex) by `tensor_store.tensor_digest`.
        """
        subject = [_descriptor(subject_name, model_digest, "model")]
        subject += [_descriptor(name, digest, "file") for name, digest in sorted((files or {}).items())]
        subject += [_descriptor(f"{TENSOR}{name}", d, "tensor") for name, d in sorted((tensors or {}).items())]
        statement = {
            "_type": STATEMENT_TYPE,
            "subject": subject,
            "predicateType": PREDICATE_TYPE,
            "predicate": predicate,
        }
        return cls(json.loads(_dumps(statement)))

    @classmethod
    def from_json(cls, text: str | bytes) -> Certificate:
        """Read a statement, or an envelope around one.

        Raises:
            InputError: If the text is not JSON, not a whole certificate, or of another version.
        """
        loaded = _parse(text)
        if "payloadType" not in loaded:
            certificate = cls(_checked(loaded))
            certificate.canonical()  # what has no canonical form has no digest
            return certificate
        envelope = Envelope.from_json(loaded)
        certificate = cls(_checked(_parse(envelope.payload)), envelope)
        if certificate.canonical() != envelope.payload:
            raise InputError("the signed payload is not canonical JSON (RFC 8785): it was not made by weightproof")
        return certificate

    @classmethod
    def load(cls, path: Path | str) -> Certificate:
        """Read a certificate file, signed or not."""
        try:
            with Path(path).open("rb") as file:
                content = file.read(_MAX_BYTES + 1)
        except OSError as error:
            raise InputError(f"cannot read the certificate {path}: {error.strerror or error}") from error
        if len(content) > _MAX_BYTES:
            raise InputError(f"{path} is larger than any certificate ({_MAX_BYTES >> 20} MiB): is it another file?")
        return cls.from_json(content)

    def to_json(self) -> str:
        """Canonical JSON (RFC 8785): the text the digest is over."""
        return self.canonical().decode()

    def canonical(self) -> bytes:
        """Canonical bytes (RFC 8785): what is digested, and the payload of the envelope."""
        return _dumps(self.statement)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON."""
        return hashlib.sha256(self.canonical()).hexdigest()

    @property
    def model_digest(self) -> str:
        """SHA-256 (hex) of the model the statement is about."""
        return str(self.statement["subject"][0]["digest"]["sha256"])

    @property
    def subject_name(self) -> str:
        """Name of the model the statement is about."""
        return str(self.statement["subject"][0]["name"])

    @property
    def files(self) -> dict[str, str]:
        """Relative path -> SHA-256 (hex) of every file of the subject; empty for a model in memory."""
        return dict(self._subjects("file"))

    @property
    def tensors(self) -> dict[str, str]:
        """Name -> tensor digest (hex) of every tensor of the subject."""
        return {name.removeprefix(TENSOR): digest for name, digest in self._subjects("tensor")}

    @property
    def predicate(self) -> Mapping[str, Any]:
        """The evidence."""
        return self.statement["predicate"]

    @property
    def is_signed(self) -> bool:
        """Whether there is a signature at all; whose it is, only `verify` says."""
        return self.envelope is not None

    @property
    def signatures(self) -> tuple[str, ...]:
        """Key ids that the envelope claims; nothing is proven by them."""
        return () if self.envelope is None else tuple(one.keyid for one in self.envelope.signatures)

    def save(self, path: Path | str, key: Ed25519PrivateKey | None = None) -> Path:
        """Write the certificate; the old file is kept if this fails.

        Args:
            path: The file.
            key: Signs it: the file then holds a DSSE envelope instead of the bare, indented statement.
        """
        path = Path(path)
        envelope = self.envelope if key is None else sign(self.canonical(), key)
        content = self.statement if envelope is None else envelope.to_json()
        text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        write_atomically(path, text.encode())
        return path

    def _subjects(self, kind: str) -> Iterable[tuple[str, str]]:
        for one in cast("list[dict[str, Any]]", self.statement["subject"]):
            if one["annotations"]["kind"] == kind:
                yield one["name"], one["digest"]["sha256"]


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of the statement."""
    text = resources.files("weightproof").joinpath("data", "certificate.schema.json").read_text(encoding="utf-8")
    return json.loads(text)


def _descriptor(name: str, digest: str, kind: str) -> dict[str, Any]:
    return {"name": name, "digest": {"sha256": digest}, "annotations": {"kind": kind}}


def _dumps(value: Mapping[str, Any]) -> bytes:
    try:
        return rfc8785.dumps(dict(value))
    except (rfc8785.CanonicalizationError, UnicodeError) as error:
        raise InputError(f"the certificate holds what JSON cannot carry exactly: {error}") from error


def _parse(text: str | bytes) -> dict[str, Any]:
    try:
        loaded: object = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except RecursionError as error:
        raise InputError("not a certificate: its JSON is nested too deeply") from error
    except ValueError as error:
        raise InputError(f"not a certificate: the text is not JSON ({error})") from error
    if not isinstance(loaded, dict):
        raise InputError("not a certificate: a JSON object was expected")
    found = cast("dict[str, Any]", loaded)
    _require_shallow(found)
    return found


def _require_shallow(loaded: object) -> None:
    """Refuse what is nested so deeply that walking it would end the program."""
    level = [loaded]
    for _ in range(_MAX_DEPTH):
        level = [item for one in level for item in _inside(one)]
        if not level:
            return
    raise InputError("not a certificate: its JSON is nested too deeply")


def _inside(one: object) -> Iterable[object]:
    if isinstance(one, dict):
        return cast("dict[str, object]", one).values()
    return cast("list[object]", one) if isinstance(one, list) else ()


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object in which no key occurs twice: readers would disagree on which one counts."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _checked(statement: dict[str, Any]) -> dict[str, Any]:
    """The statement, if it is a whole certificate of this version."""
    _check_version(statement.get("predicateType"))
    if statement.get("_type") != STATEMENT_TYPE:
        raise InputError(f"not a whole certificate: _type is {statement.get('_type')!r}, not {STATEMENT_TYPE!r}")
    subject, predicate = statement.get("subject"), statement.get("predicate")
    if not isinstance(subject, list) or not subject or not all(map(_is_descriptor, cast("list[Any]", subject))):
        raise InputError("not a whole certificate: a subject is missing, or has no name, kind or sha256")
    kinds = [one["annotations"]["kind"] for one in cast("list[dict[str, Any]]", subject)]
    if kinds[0] != "model" or "model" in kinds[1:]:
        raise InputError("not a whole certificate: its first subject, and no other, must be the model")
    names = [one["name"] for one in cast("list[dict[str, Any]]", subject)[1:]]
    if len(set(names)) != len(names):
        raise InputError("not a whole certificate: two of its subjects have the same name")
    if not isinstance(predicate, dict):
        raise InputError("not a whole certificate: its predicate is missing")
    for name, kind in _EXPECTED.items():
        if not isinstance(cast("dict[str, Any]", predicate).get(name), kind):
            raise InputError(f"not a whole certificate: predicate.{name} is missing or of another kind")
    return statement


def _check_version(found: object) -> None:
    if found == PREDICATE_TYPE:
        return
    match = _OURS.fullmatch(found) if isinstance(found, str) else None
    if match is None:
        raise InputError(f"not a certificate of weightproof: predicateType is {found!r}, not {PREDICATE_TYPE!r}")
    if int(match[1]) == 0:
        raise InputError(
            "this certificate has format 0, which holds too little to be verified: make it again with this version"
        )
    raise InputError(f"this certificate has format {match[1]}, this version reads format 1: upgrade weightproof")


def _is_descriptor(found: Any) -> bool:
    try:
        return (
            isinstance(found["name"], str)
            and _SHA256.fullmatch(found["digest"]["sha256"]) is not None
            and found["annotations"]["kind"] in ("model", "file", "tensor")
        )
    except (LookupError, TypeError):
        return False
