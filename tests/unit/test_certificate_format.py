"""docs/certificate-format.md is enough to write a verifier: this one is written from it, without weightproof.

Only the fixture, which makes what is verified, uses the library.
"""

import base64
import hashlib
import json
import math
import re
import struct
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PAGE = Path(__file__).parents[2] / "docs" / "certificate-format.md"
TYPE = "application/vnd.in-toto+json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "I64": "int64"}
SIZES = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8}


# ---------------------------------------------------------------- what the page defines


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def number(value: float) -> str:
    """ECMAScript's shortest form of a double, as RFC 8785 wants it."""
    if isinstance(value, int):
        return str(value)
    if value == int(value) and abs(value) < 1e21:
        return str(int(value))
    sign, value = ("-", -value) if value < 0 else ("", value)
    mantissa, _, exponent = f"{value!r}e0".partition("e")
    exponent = int(exponent.removesuffix("e0"))
    whole, _, fraction = mantissa.partition(".")
    digits = (whole + fraction).lstrip("0")
    point = exponent + len(whole) - (len(whole + fraction) - len(digits))
    digits = digits.rstrip("0")
    if -6 < point <= 0:
        return f"{sign}0.{'0' * -point}{digits}"
    if 0 < point <= 21:
        return f"{sign}{digits[:point]}.{digits[point:]}"
    rest = f".{digits[1:]}" if len(digits) > 1 else ""
    return f"{sign}{digits[0]}{rest}e{'+' if point > 0 else '-'}{abs(point - 1)}"


def canonical(value: object) -> str:
    if isinstance(value, dict):
        keys = sorted(value, key=lambda key: key.encode("utf-16-be"))
        return "{" + ",".join(f"{canonical(key)}:{canonical(value[key])}" for key in keys) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical, value)) + "]"
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return number(value)


def digest(value: object) -> str:
    return sha256(canonical(value).encode())


def pae(payload: bytes) -> bytes:
    return f"DSSEv1 {len(TYPE)} {TYPE} {len(payload)} ".encode() + payload


def tensor_digest(dtype: str, shape: list[int], content: bytes) -> str:
    leaves = [content]
    if len(shape) > 1:
        size = len(content) // max(shape[0], 1)
        leaves = [content[row * size : (row + 1) * size] for row in range(shape[0])]
    header = f"{dtype}{shape}".encode()
    return sha256(header + b"".join(hashlib.sha256(leaf).digest() for leaf in leaves))


def model_digest(tensors: dict[str, str]) -> str:
    return sha256("".join(f"{name}={tensors[name]}\n" for name in sorted(tensors)).encode())


def tensors_of(path: Path) -> dict[str, str]:
    """Digests of the tensors of one safetensors file."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    found = {}
    for name, one in header.items():
        start, stop = one["data_offsets"]
        raw = content[8 + size + start : 8 + size + stop]
        assert len(raw) == math.prod(one["shape"]) * SIZES[one["dtype"]]
        found[name] = tensor_digest(DTYPES[one["dtype"]], one["shape"], raw)
    return found


# ---------------------------------------------------------------- the worked example


@pytest.fixture(scope="module")
def page() -> dict[str, str]:
    """The lines of the worked example: what stands left, and the value right of it."""
    found = re.findall(r"^    (\S.*?) {2,}(\S.*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(found) == len(dict(found))
    return dict(found)


def test_the_digests_of_the_example(page):
    bias, rows = struct.pack("<2f", 1.0, -0.5), [struct.pack("<2f", 0.5, 1.0), struct.pack("<2f", -2.0, 0.0)]
    assert page["bytes of a.bias"] == bias.hex()
    assert page["leaf of a.bias"] == sha256(bias)
    assert page["digest of a.bias"] == tensor_digest("float32", [2], bias)
    assert page["header of a.bias"] == f"float32{[2]}"
    assert [page[f"bytes of a.weight[{row}]"] for row in (0, 1)] == [row.hex() for row in rows]
    assert [page[f"leaf of a.weight[{row}]"] for row in (0, 1)] == [sha256(row) for row in rows]
    assert page["header of a.weight"] == f"float32{[2, 2]}"
    assert page["digest of a.weight"] == tensor_digest("float32", [2, 2], b"".join(rows))
    tensors = {"a.weight": page["digest of a.weight"], "a.bias": page["digest of a.bias"]}
    assert page["model digest"] == model_digest(tensors)


def test_the_signature_of_the_example(page):
    text = canonical({"b": 1.0, "a": [0.1, "NaN"]})
    assert page["canonical"] == text
    assert page["digest of canonical"] == sha256(text.encode())
    key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    public = key.public_key().public_bytes_raw()
    assert page["public key"] == public.hex()
    assert page["key id"] == sha256(public)
    assert page["signed bytes"].encode() == pae(text.encode())
    Ed25519PublicKey.from_public_bytes(public).verify(bytes.fromhex(page["signature"]), pae(text.encode()))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "1"),
        (0.1, "0.1"),
        (-2.5, "-2.5"),
        (1e-7, "1e-7"),
        (1.5e-7, "1.5e-7"),
        (1e-6, "0.000001"),
        (0.000123, "0.000123"),
        (1e21, "1e+21"),
        (1.25e300, "1.25e+300"),
        (123456.789, "123456.789"),
        (333333333.33333329, "333333333.3333333"),
    ],
)
def test_numbers_are_written_as_rfc_8785_wants_them(value, text):
    assert number(value) == text


# ---------------------------------------------------------------- a real certificate


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model folder, its signed certificate, and the public key's file."""
    import torch
    from architectures import build

    from weightproof import GuardSession, edits, signing
    from weightproof.certificate import Certificate
    from weightproof.folders.file_digests import file_digests

    folder = tmp_path_factory.mktemp("format")
    torch.manual_seed(0)
    model = build("llama")
    session = GuardSession(model)
    session.apply(edits.RTN(8))
    model.save_pretrained(folder / "model")
    plain = session.certificate()
    certificate = Certificate.build(
        subject_name="model",
        model_digest=plain.model_digest,
        predicate=plain.predicate,
        files=file_digests(folder / "model"),
        tensors=plain.tensors,
    )
    key = signing.generate_key()
    signing.write_key_pair(folder / "signer", key)
    certificate.save(folder / "certificate.json", key)
    return folder


@pytest.fixture(scope="module")
def statement(made):
    envelope = json.loads((made / "certificate.json").read_text())
    return json.loads(base64.b64decode(envelope["payload"]))


def test_the_envelope_is_signed_as_the_page_says(made):
    envelope = json.loads((made / "certificate.json").read_text())
    assert envelope["payloadType"] == TYPE
    payload = base64.b64decode(envelope["payload"], validate=True)
    pem = (made / "signer.pub").read_text().splitlines()
    raw = base64.b64decode("".join(pem[1:-1]))[-32:]
    [signature] = envelope["signatures"]
    assert signature["keyid"] == sha256(raw)
    public = Ed25519PublicKey.from_public_bytes(raw)
    public.verify(base64.b64decode(signature["sig"]), pae(payload))
    with pytest.raises(InvalidSignature):
        public.verify(base64.b64decode(signature["sig"]), payload)
    assert canonical(json.loads(payload)).encode() == payload


def test_the_subject_is_the_folder(made, statement):
    kinds = {kind: {} for kind in ("model", "file", "tensor")}
    for one in statement["subject"]:
        kinds[one["annotations"]["kind"]][one["name"]] = one["digest"]["sha256"]
    folder = made / "model"
    on_disk = {p.relative_to(folder).as_posix(): sha256(p.read_bytes()) for p in folder.rglob("*") if p.is_file()}
    assert kinds["file"] == on_disk
    transient = statement["predicate"]["transient"]
    stated = {name.removeprefix("tensor:"): found for name, found in kinds["tensor"].items()}
    assert tensors_of(folder / "model.safetensors") == {n: d for n, d in stated.items() if n not in transient}
    assert list(kinds["model"].values()) == [model_digest(stated)]


def test_what_follows_from_the_rest_follows(statement):
    predicate = statement["predicate"]
    assert digest(predicate["policy"]["resolved"]) == predicate["policy"]["digest"]
    for readings in predicate["readings"].values():
        assert readings["model_digest"] == model_digest({n: t["digest"] for n, t in readings["tensors"].items()})
    [step] = predicate["steps"]
    after = predicate["readings"][step["judged_on"]["after"]]
    assert after["edit"] == step["record"]
    assert after["model_digest"] == step["record"]["digest_after"]
    assert predicate["decision"]["evidence_digest"] == step["evidence_digest"]
    assert set(after["order"]["matrices"]) == set(after["matrices"])


def test_both_digests_of_a_decision_are_computed_as_the_page_says(statement):
    [step] = statement["predicate"]["steps"]
    names = ("guard", "outcome", "measurements", "reason", "num_measured", "num_eligible")
    evidence = {name: step[name] for name in ("action", "situation", "reason", "warned", "assurance", "step")}
    evidence |= {name: step[name] for name in ("world_size", "policy_digest", "reported")}
    evidence["verdicts"] = [{name: verdict[name] for name in names} for verdict in step["verdicts"]]
    assert digest(evidence) == step["evidence_digest"]

    def texts(one: dict) -> list[str]:
        found = [one[name] for name in ("guard", "target", "statistic", "family", "outcome")]
        return [*found, "" if one["value"] is None else "measured"]

    decision = {name: step[name] for name in ("action", "situation", "warned", "assurance", "step", "policy_digest")}
    decision["verdicts"] = [
        {
            "guard": verdict["guard"],
            "outcome": verdict["outcome"],
            "measured": [verdict["num_measured"], verdict["num_eligible"]],
            "measurements": [texts(one) for one in verdict["measurements"]],
        }
        for verdict in step["verdicts"]
    ]
    decision["reported"] = [texts(one) for one in step["reported"]]
    assert digest(decision) == step["decision_digest"]


def test_the_page_names_every_field_of_the_predicate(statement):
    text = PAGE.read_text(encoding="utf-8")
    for name in (*statement["predicate"], *statement["predicate"]["steps"][0]):
        if name not in ("name", "seconds", "kind", "monitor"):
            assert f"`{name}`" in text or f"`{name}:" in text, name
