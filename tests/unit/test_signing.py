"""Envelopes and keys: whoever did not sign is not believed, and a private key is not left readable."""

import base64
import json
import os
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from weightproof import Certificate, InputError, signing
from weightproof.cli import main

PAYLOAD = b'{"a":1}'


@pytest.fixture(scope="module")
def key():
    return signing.generate_key()


@pytest.fixture
def pair(tmp_path, key):
    return signing.write_key_pair(tmp_path / "signer", key)


def test_pae_is_that_of_the_specification():
    # https://github.com/secure-systems-lab/dsse/blob/master/protocol.md
    assert signing.pae(b"hello world", "http://example.com/HelloWorld") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


def test_envelope_comes_back_and_names_who_signed(key):
    envelope = signing.sign(PAYLOAD, key)
    again = signing.Envelope.from_json(json.loads(json.dumps(envelope.to_json())))
    assert again == envelope
    other = signing.generate_key().public_key()
    assert signing.verify_envelope(again, [other, key.public_key()]) == (signing.key_id(key.public_key()),)
    assert signing.verify_envelope(again, [other]) == ()


@pytest.mark.parametrize("part", ["payload", "payload_type", "sig"])
def test_one_changed_bit_of_any_part_is_noticed(key, part):
    envelope = signing.sign(PAYLOAD, key)
    [signature] = envelope.signatures
    payload, kind, sig = envelope.payload, envelope.payload_type, signature.sig
    if part == "payload":
        payload = bytes([payload[0] ^ 1]) + payload[1:]
    elif part == "payload_type":
        kind = kind.replace("json", "jsom")
    else:
        sig = bytes([sig[0] ^ 1]) + sig[1:]
    changed = signing.Envelope(payload, kind, (signing.Signature(signature.keyid, sig),))
    assert signing.verify_envelope(changed, [key.public_key()]) == ()


def test_the_hint_of_a_key_proves_nothing(key):
    other = signing.generate_key()
    [theirs] = signing.sign(PAYLOAD, other).signatures
    claimed = signing.Signature(signing.key_id(key.public_key()), theirs.sig)
    envelope = signing.Envelope(PAYLOAD, signing.PAYLOAD_TYPE, (claimed,))
    assert signing.verify_envelope(envelope, [key.public_key()]) == ()
    assert signing.verify_envelope(envelope, [other.public_key()]) == (signing.key_id(other.public_key()),)


def test_a_payload_that_is_not_canonical_is_refused(key):
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "m", "digest": {"sha256": "ab" * 32}, "annotations": {"kind": "model"}}],
        "predicateType": "urn:weightproof:certificate:v1",
        "predicate": {
            **{name: {} for name in ("environment", "policy", "baseline", "readings", "cost")},
            **{name: [] for name in ("windows", "steps", "not_tested")},
        },
    }
    loose = signing.sign(json.dumps(statement, indent=1).encode(), key)
    with pytest.raises(InputError, match="canonical"):
        Certificate.from_json(json.dumps(loose.to_json()))
    strict = signing.sign(Certificate(statement).canonical(), key)
    assert Certificate.from_json(json.dumps(strict.to_json())).statement == statement


# ---------------------------------------------------------------- files


def test_key_files_come_back_and_only_the_owner_reads_the_private_one(pair, key):
    private, public = pair
    assert private.stat().st_mode & 0o777 == 0o600
    assert signing.key_id(signing.load_public_key(public)) == signing.key_id(key.public_key())
    assert signing.load_private_key(private).private_bytes_raw() == key.private_bytes_raw()
    assert sorted(path.name for path in private.parent.iterdir()) == ["signer", "signer.pub"]


@pytest.mark.parametrize("there", ["signer", "signer.pub"])
def test_a_key_is_never_overwritten(tmp_path, key, there):
    (tmp_path / there).write_text("precious")
    with pytest.raises(InputError, match="never overwritten"):
        signing.write_key_pair(tmp_path / "signer", key)
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "precious"


def test_a_failing_write_leaves_nothing(tmp_path, key, monkeypatch):
    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(InputError, match="No space left"):
        signing.write_key_pair(tmp_path / "signer", key)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_private_key_that_others_can_read_is_refused_with_the_command(pair, mode):
    private, _ = pair
    private.chmod(mode)
    with pytest.raises(InputError, match=f"chmod 600 {private}"):
        signing.load_private_key(private)


def test_the_wrong_file_is_named_for_what_it_is(pair, tmp_path, key):
    private, public = pair
    with pytest.raises(InputError, match="public key: signing needs"):
        copy = tmp_path / "copy"
        copy.write_bytes(public.read_bytes())
        copy.chmod(0o600)
        signing.load_private_key(copy)
    with pytest.raises(InputError, match="holds a private key"):
        signing.load_public_key(private)
    for load in (signing.load_private_key, signing.load_public_key):
        with pytest.raises(InputError, match="No such file"):
            load(tmp_path / "none")
    junk = tmp_path / "junk"
    junk.write_bytes(b"\x00\xff" * 40)
    junk.chmod(0o600)
    with pytest.raises(InputError, match="no PEM private key"):
        signing.load_private_key(junk)
    with pytest.raises(InputError, match="no PEM public key"):
        signing.load_public_key(junk)
    with pytest.raises(InputError, match=r"is no file|Is a directory"):
        signing.load_private_key(tmp_path)


def test_keys_of_another_kind_are_refused(tmp_path):
    key = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    path = tmp_path / "rsa"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    path.chmod(0o600)
    with pytest.raises(InputError, match="another kind"):
        signing.load_private_key(path)
    public = tmp_path / "rsa.pub"
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    with pytest.raises(InputError, match="another kind"):
        signing.load_public_key(public)


def test_an_encrypted_key_needs_its_passphrase(tmp_path, key):
    private, _ = signing.write_key_pair(tmp_path / "locked", key, "correct horse")
    with pytest.raises(InputError, match="is encrypted"):
        signing.load_private_key(private)
    with pytest.raises(InputError, match="passphrase is wrong"):
        signing.load_private_key(private, "battery staple")
    assert signing.load_private_key(private, "correct horse").private_bytes_raw() == key.private_bytes_raw()


def test_a_passphrase_for_an_open_key_is_refused(pair):
    with pytest.raises(InputError, match="not encrypted"):
        signing.load_private_key(pair[0], "anything")


def test_keygen_writes_a_pair_that_openssl_would_read(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["keygen", str(tmp_path / "signer"), "--json"])
    assert stop.value.code == 0
    found = json.loads(capsys.readouterr().out)
    public = signing.load_public_key(found["public"])
    assert found["key_id"] == signing.key_id(public)
    lines = (tmp_path / "signer.pub").read_text().splitlines()
    raw = base64.b64decode("".join(lines[1:-1]))
    # RFC 8410: the last 32 bytes of the SubjectPublicKeyInfo are the key.
    assert raw[-32:] == public.public_bytes_raw()
    assert isinstance(signing.load_private_key(tmp_path / "signer"), ed25519.Ed25519PrivateKey)
    with pytest.raises(SystemExit) as stop:
        main(["keygen", str(tmp_path / "signer")])
    assert stop.value.code == 3
    assert "never overwritten" in capsys.readouterr().err


def test_the_library_loads_without_cryptography_until_somebody_signs():
    code = "import sys, weightproof.certificate; sys.exit('cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
