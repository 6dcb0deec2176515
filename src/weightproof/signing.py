"""Signatures: a DSSE envelope with Ed25519, and the key files for it.

What is signed is not the payload but its pre-authentication encoding (DSSE v1.0.2, protocol.md):

    PAE = "DSSEv1" SP len(type) SP type SP len(payload) SP payload

so that bytes signed as one type of document cannot be shown as another. A key's id is the SHA-256 of its
32 raw public bytes; it helps to find the key and proves nothing.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from weightproof.errors import InputError
from weightproof.folders.files import sync_folder

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PAYLOAD_TYPE = "application/vnd.in-toto+json"
_READABLE_BY_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_MAX_KEY_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Signature:
    """One signature of an envelope; `keyid` is a hint."""

    keyid: str
    sig: bytes


@dataclass(frozen=True, slots=True)
class Envelope:
    """A DSSE envelope: the payload's bytes and who signed them."""

    payload: bytes
    payload_type: str
    signatures: tuple[Signature, ...]

    def to_json(self) -> dict[str, Any]:
        """The envelope as JSON types, bytes in base64."""
        signatures = [{"keyid": one.keyid, "sig": _base64(one.sig)} for one in self.signatures]
        return {"payload": _base64(self.payload), "payloadType": self.payload_type, "signatures": signatures}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Envelope:
        """Read an envelope.

        Raises:
            InputError: If a part is missing, not base64, or of another payload type.
        """
        payload, kind, signatures = found.get("payload"), found.get("payloadType"), found.get("signatures")
        if kind != PAYLOAD_TYPE:
            raise InputError(f"the envelope's payloadType is {kind!r}; a certificate's is {PAYLOAD_TYPE!r}")
        if not isinstance(signatures, list) or not signatures:
            raise InputError("the envelope has no signature: it is not a whole DSSE envelope")
        return cls(_bytes(payload, "payload"), kind, tuple(_signature(one) for one in cast("list[Any]", signatures)))


def _signature(found: Any) -> Signature:
    if not isinstance(found, Mapping):
        raise InputError("a signature of the envelope is no JSON object: it is not a whole DSSE envelope")
    keyid = cast("Mapping[str, Any]", found).get("keyid", "")
    if not isinstance(keyid, str):
        raise InputError("a keyid of the envelope is not text: it is not a whole DSSE envelope")
    return Signature(keyid, _bytes(cast("Mapping[str, Any]", found).get("sig"), "sig"))


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def _bytes(text: object, name: str) -> bytes:
    try:
        return base64.b64decode(cast("str", text), validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise InputError(f"the envelope's {name} is missing or not base64: it is not a whole DSSE envelope") from error


def pae(payload: bytes, payload_type: str = PAYLOAD_TYPE) -> bytes:
    """The bytes that are signed (DSSE pre-authentication encoding).

    Example:
        >>> pae(b"hello world", "http://example.com/HelloWorld")
        b'DSSEv1 29 http://example.com/HelloWorld 11 hello world'
    """
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def sign(payload: bytes, key: Ed25519PrivateKey) -> Envelope:
    """An envelope with one signature over the payload."""
    signature = Signature(key_id(key.public_key()), key.sign(pae(payload)))
    return Envelope(payload, PAYLOAD_TYPE, (signature,))


def verify_envelope(envelope: Envelope, keys: Sequence[Ed25519PublicKey]) -> tuple[str, ...]:
    """Ids of those of the keys that really signed the payload; empty where none did.

    The `keyid` of a signature is not trusted: every signature is tried with every key.
    """
    from cryptography.exceptions import InvalidSignature

    message, found = pae(envelope.payload, envelope.payload_type), list[str]()
    for key in keys:
        for signature in envelope.signatures:
            try:
                key.verify(signature.sig, message)
            except InvalidSignature:
                continue
            found.append(key_id(key))
            break
    return tuple(found)


def key_id(key: Ed25519PublicKey) -> str:
    """SHA-256 (hex) of the 32 raw bytes of a public key."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()


# ---------------------------------------------------------------- key files


def generate_key() -> Ed25519PrivateKey:
    """A new private key from the operating system's randomness."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.generate()


def write_key_pair(path: Path | str, key: Ed25519PrivateKey, passphrase: str | None = None) -> tuple[Path, Path]:
    """Write a private key (PEM, PKCS 8, mode 0600) and beside it its public key (`.pub`).

    Args:
        path: File of the private key.
        key: The key.
        passphrase: Encrypts the private key's file where given.

    Returns:
        The paths of the private and of the public key.

    Raises:
        InputError: If one of the files exists (a key is never overwritten) or cannot be written.
    """
    from cryptography.hazmat.primitives import serialization

    path = Path(path)
    public = path.with_name(f"{path.name}.pub")
    for file in (path, public):
        if file.exists() or file.is_symlink():
            raise InputError(f"{file} exists: a key is never overwritten; choose another name or remove it yourself")
    lock = serialization.BestAvailableEncryption(passphrase.encode()) if passphrase else serialization.NoEncryption()
    private_pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)
    public_pem = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    _write_new(public, public_pem, 0o644)
    try:
        _write_new(path, private_pem, 0o600)
    except InputError:
        public.unlink(missing_ok=True)
        raise
    return path, public


def _write_new(path: Path, content: bytes, mode: int) -> None:
    """Write a file that must not exist yet: whole under another name, then linked to its own."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with os.fdopen(handle, "wb") as file:
                os.fchmod(file.fileno(), mode)  # whatever the umask is
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)  # unlike a rename it fails where the name is taken
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    except FileExistsError as error:
        raise InputError(f"{path} exists: a key is never overwritten; choose another name") from error
    except OSError as error:
        raise InputError(f"cannot write the key {path}: {error.strerror or error}") from error


def load_private_key(path: Path | str, passphrase: str | None = None) -> Ed25519PrivateKey:
    """Read a private key that nobody but its owner can read.

    Raises:
        InputError: If the file is missing, readable by group or others, encrypted and no (or a wrong) passphrase is
            given, or holds no Ed25519 private key.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    content = _read_private(Path(path))
    if b"PUBLIC KEY" in content:
        raise InputError(f"{path} holds a public key: signing needs the private one (without .pub)")
    if b"ENCRYPTED" in content and not passphrase:
        raise InputError(
            f"{path} is encrypted: give its passphrase (load_private_key(path, passphrase)), or write a copy without "
            f"one for this machine alone (`openssl pkey -in {path} -out FILE`, then `chmod 600 FILE`)"
        )
    try:
        key = load_pem_private_key(content, passphrase.encode() if passphrase else None)
    except TypeError as error:
        raise InputError(f"{path} is not encrypted, yet a passphrase was given: leave the passphrase out") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        why = "the passphrase is wrong, or it is damaged" if b"ENCRYPTED" in content else "it is no PEM private key"
        raise InputError(f"{path} cannot be read as a private key: {why}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{path} holds a key of another kind; make an Ed25519 key with `weightproof keygen`")
    return key


def _read_private(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise InputError(f"{path} is no file; give the file of a private key")
            if mode & _READABLE_BY_OTHERS:
                raise InputError(
                    f"the private key {path} can be read by others (mode {stat.S_IMODE(mode):04o}): run "
                    f"`chmod 600 {path}`, and make a new key if others may have read this one"
                )
            return file.read(_MAX_KEY_BYTES)
    except OSError as error:
        raise InputError(f"cannot read the private key {path}: {error.strerror or error}") from error


def load_public_key(path: Path | str) -> Ed25519PublicKey:
    """Read a public key.

    Raises:
        InputError: If the file is missing, holds a private key, or no Ed25519 public key.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        with Path(path).open("rb") as file:
            content = file.read(_MAX_KEY_BYTES)
    except OSError as error:
        raise InputError(f"cannot read the public key {path}: {error.strerror or error}") from error
    if b"PRIVATE KEY" in content:
        raise InputError(f"{path} holds a private key: give its public key (the file ending in .pub), never this one")
    try:
        key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path} cannot be read as a public key: it is no PEM public key") from error
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"{path} holds a key of another kind; certificates are signed with Ed25519")
    return key
