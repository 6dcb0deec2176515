"""Certificates: canonical, digested, round trip."""

import json

import pytest

from weightproof import Certificate, InputError


def build(predicate):
    return Certificate.build(subject_name="model", model_digest="ab" * 32, predicate=predicate)


def test_json_round_trip_keeps_certificate_and_digest():
    certificate = build(
        {"value": 0.1, "big": 2**53 - 1, "none": None, "text": "Größe", "nested": [1, {"b": 1, "a": 2}]}
    )
    again = Certificate.from_json(certificate.to_json())
    assert again == certificate
    assert again.digest == certificate.digest


def test_digest_ignores_key_order_and_layout():
    assert build({"a": 1, "b": 2}).digest == build({"b": 2, "a": 1}).digest
    assert build({"a": 1}).digest != build({"a": 2}).digest


def test_saved_file_reads_back(tmp_path):
    certificate = build({"a": [1.5, "x"]})
    path = certificate.save(tmp_path / "deep" / "certificate.json")
    assert Certificate.load(path) == certificate
    assert [p.name for p in path.parent.iterdir()] == ["certificate.json"]


def test_statement_has_the_in_toto_shape():
    statement = json.loads(build({}).to_json())
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["subject"] == [{"name": "model", "digest": {"sha256": "ab" * 32}}]


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not JSON"), ("[1]", "JSON object"), ('{"predicateType": "x"}', "predicateType")]
)
def test_other_texts_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        Certificate.from_json(text)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.json"):
        Certificate.load(tmp_path / "none.json")
