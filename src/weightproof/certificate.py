"""The certificate: an in-toto Statement over the weights, with the evidence behind each decision.

Format (version 0, unsigned): in-toto Statement v1 whose subject is the digest of the model and
whose predicate carries the baseline, the policy, every judged step with its measurements and
limits, what was not tested, and the cost. `digest` is the SHA-256 of its RFC 8785 JSON, so it
does not depend on key order or white space.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import rfc8785

from weightproof.errors import InputError
from weightproof.files import write_atomically

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:weightproof:certificate:v0"


@dataclass(frozen=True)
class Certificate:
    """One statement. `Certificate.from_json(c.to_json()) == c`."""

    statement: Mapping[str, Any]

    @classmethod
    def build(cls, *, subject_name: str, model_digest: str, predicate: Mapping[str, Any]) -> Certificate:
        """A statement that `predicate` holds for the model with this digest."""
        statement = {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": subject_name, "digest": {"sha256": model_digest}}],
            "predicateType": PREDICATE_TYPE,
            "predicate": predicate,
        }
        return cls.from_json(json.dumps(statement))

    @classmethod
    def from_json(cls, text: str | bytes) -> Certificate:
        """Read a statement.

        Raises:
            InputError: If the text is not JSON or not a weightproof certificate of this version.
        """
        try:
            loaded: object = json.loads(text)
        except ValueError as error:
            raise InputError(f"not a certificate: the text is not JSON ({error})") from error
        if not isinstance(loaded, dict):
            raise InputError("not a certificate: a JSON object was expected")
        statement = cast("dict[str, Any]", loaded)
        if statement.get("predicateType") != PREDICATE_TYPE:
            raise InputError(
                f"not a certificate this version reads: predicateType is {statement.get('predicateType')!r}, "
                f"expected {PREDICATE_TYPE!r}"
            )
        try:
            whole = isinstance(statement["subject"][0]["digest"]["sha256"], str)
        except (LookupError, TypeError):
            whole = False
        if not whole or not isinstance(statement.get("predicate"), dict):
            raise InputError("not a whole certificate: its subject has no sha256, or its predicate is missing")
        return cls(statement)

    @classmethod
    def load(cls, path: Path | str) -> Certificate:
        """Read a certificate file."""
        try:
            return cls.from_json(Path(path).read_bytes())
        except OSError as error:
            raise InputError(f"cannot read the certificate {path}: {error.strerror or error}") from error

    def to_json(self) -> str:
        """Canonical JSON (RFC 8785): the text the digest is over."""
        return self.canonical().decode()

    def canonical(self) -> bytes:
        """Canonical bytes (RFC 8785)."""
        return rfc8785.dumps(dict(self.statement))

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON."""
        return hashlib.sha256(self.canonical()).hexdigest()

    @property
    def model_digest(self) -> str:
        """SHA-256 (hex) of the model the statement is about."""
        return str(self.statement["subject"][0]["digest"]["sha256"])

    @property
    def predicate(self) -> Mapping[str, Any]:
        """The evidence."""
        return self.statement["predicate"]

    def save(self, path: Path | str) -> Path:
        """Write the indented JSON; the old file is kept if this fails."""
        path = Path(path)
        text = json.dumps(self.statement, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        write_atomically(path, text.encode())
        return path
