"""Certificates: canonical, digested, round trip; what is no whole certificate is refused in a sentence."""

import json
from dataclasses import replace

import certificate_schema
import hand_readings as by_hand
import jsonschema
import pytest

from weightproof import Certificate, InputError
from weightproof.certificate import PREDICATE_TYPE, schema
from weightproof.certifying.form import content_of
from weightproof.folders.jsonable import to_jsonable
from weightproof.judgement.case_file import Base, CaseFile, statement_of
from weightproof.policy import load_policy
from weightproof.readings.readings_json import from_jsonable, readings_json, readings_of
from weightproof.types import CircuitReading, LossReading, Measurement, Readings

WHOLE = {
    **{key: {} for key in ("environment", "policy", "baseline", "readings", "cost")},
    **{key: [] for key in ("windows", "steps", "not_tested")},
}


def build(predicate):
    return Certificate.build(subject_name="model", model_digest="ab" * 32, predicate={**WHOLE, **predicate})


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
    assert statement["predicateType"] == PREDICATE_TYPE == "urn:weightproof:certificate:v1"
    [subject] = statement["subject"]
    assert (subject["name"], subject["digest"]) == ("model", {"sha256": "ab" * 32})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "JSON object"),
        ('{"predicateType": "x"}', "predicateType"),
        ('{"predicateType": "urn:weightproof:certificate:v0"}', "format 0.*make it again"),
        ('{"predicateType": "urn:weightproof:certificate:v2"}', "format 2.*upgrade weightproof"),
        ('{"predicateType": "x", "predicateType": "y"}', "occurs twice"),
        ('{"predicateType": NaN}', "NaN is not JSON"),
        ("[" * 100_000, "too deeply"),
        ('{"a":' * 200 + "1" + "}" * 200, "too deeply"),
        ('{"payloadType": "text/plain"}', "payloadType"),
        ('{"payloadType": "application/vnd.in-toto+json", "payload": "%", "signatures": [{"sig": "x"}]}', "base64"),
        ('{"payloadType": "application/vnd.in-toto+json", "payload": "e30=", "signatures": []}', "no signature"),
    ],
)
def test_other_texts_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        Certificate.from_json(text)


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_a_missing_part_is_named(name):
    statement = json.loads(build({}).to_json())
    del statement["predicate"][name]
    with pytest.raises(InputError, match=rf"predicate\.{name}"):
        Certificate.from_json(json.dumps(statement))


@pytest.mark.parametrize("value", [2**60, "\ud800"])
def test_what_has_no_canonical_form_is_refused(value):
    statement = json.loads(build({"value": 0}).to_json())
    statement["predicate"]["value"] = value
    with pytest.raises(InputError, match="cannot carry exactly"):
        Certificate.from_json(json.dumps(statement))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.json"):
        Certificate.load(tmp_path / "none.json")


# ---------------------------------------------------------------- readings


def full_readings():
    loss = LossReading(
        "retain",
        "ab",
        "nll",
        9,
        9,
        900,
        9,
        900,
        2.0,
        float("nan"),
        0.1,
        0.0,
        0.2,
        0.95,
        8.5,
        "bca",
        sums={"before": 2.0},
    )
    circuit = CircuitReading("model.layers.0.head.1.qk", "qk", ("q", "k"), (2.0, 1.0), "gram")
    return by_hand.after(
        "quantize",
        divergence=(by_hand.outputs(0.5),),
        second_moments={"random:model.layers.0.mlp": 1.0},
        losses=(loss,),
        circuits={circuit.name: circuit},
        unmeasured={"outputs": "no forward pass"},
        raw_losses=(1.0, float("inf")),
        loss_spike=False,
        untrained=frozenset({"x"}),
    )


def equal(one, other):
    """Equality in which NaN equals NaN."""
    return repr(one) == repr(other)


def test_readings_come_back_exactly_through_canonical_json():
    readings = full_readings()
    certificate = build({"readings": {"subject": readings_json(readings)}})
    found = readings_of(Certificate.from_json(certificate.to_json()).predicate["readings"]["subject"])
    assert equal(sorted(found.structure.ties), sorted(readings.structure.ties))
    plain = replace(found.structure, ties=readings.structure.ties)
    assert equal(replace(found, structure=plain), readings)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("matrices", 0, "spectral_norm"), "large", "spectral_norm: a number was expected"),
        (("tensors", 0, "shape"), [1.5], "a whole number"),
        (("model_digest",), None, "text was expected"),
        (("surprise",), 1, "no such field"),
        (("in_warmup",), 0, "true or false"),
        (("order", "bulks"), ["x"], "order: its names of bulks"),
        (("order", "edit"), ["x"], "has an order"),
    ],
)
def test_readings_of_another_form_are_refused_by_path(path, value, message):
    content = readings_json(full_readings())
    inner = content
    for step in path[:-1]:
        inner = inner[step] if isinstance(step, str) else next(iter(inner.values()))
    inner[path[-1]] = value
    with pytest.raises(InputError, match=message):
        readings_of(content)


def test_a_missing_field_of_a_noun_is_named():
    with pytest.raises(InputError, match=r"here\.target"):
        from_jsonable(Measurement, {"guard": "loss"}, "here")


# ---------------------------------------------------------------- case files


def case(**changes):
    before, after = by_hand.baseline(), by_hand.after()
    base = Base(readings=before, created_at="2026-01-01T00:00:00+00:00", environment={"torch": "2"}, name="base")
    fields = {
        "subject_name": "folder",
        "tensors": {name: reading.digest * 64 for name, reading in after.tensors.items()},
        "files": {"model.safetensors": "cd" * 32},
        "baseline": base,
        "current": after,
        "policy": load_policy("balanced"),
        "windows": [],
        "steps": [],
        "judged": {},
        "environment": {"torch": "2"},
        "created_at": "2026-01-01T00:00:00+00:00",
        **changes,
    }
    return CaseFile(**fields)


def test_a_case_carries_all_readings_and_its_subjects():
    found = case()
    certificate = statement_of(replace(found, tensors={"w": "ef" * 32}))
    assert certificate.files == {"model.safetensors": "cd" * 32}
    assert certificate.tensors == {"w": "ef" * 32}
    for name, readings in (("baseline", found.baseline.readings), ("subject", found.current)):
        again = readings_of(certificate.predicate["readings"][name])
        assert isinstance(again, Readings)
        assert to_jsonable(again) == to_jsonable(readings)


def test_the_policy_in_a_certificate_has_the_digest_beside_it():
    import hashlib

    import rfc8785

    policy = statement_of(replace(case(), tensors={"w": "ef" * 32})).predicate["policy"]
    assert hashlib.sha256(rfc8785.dumps(policy["resolved"])).hexdigest() == policy["digest"]


def test_several_steps_need_to_say_what_they_were_judged_from():
    with pytest.raises(InputError, match="judged="):
        statement_of(case(steps=[{"name": "a"}, {"name": "b"}], judged=None, tensors={"w": "ef" * 32}))


# ---------------------------------------------------------------- schema


def test_the_shipped_schema_is_that_of_the_types():
    assert certificate_schema.PATH.read_text() == certificate_schema.text(), (
        "python tests/support/certificate_schema.py"
    )
    jsonschema.Draft202012Validator.check_schema(schema())


def test_a_case_fits_the_schema_and_comes_back_in_types():
    certificate = statement_of(replace(case(), tensors={"w": "ef" * 32}))
    jsonschema.validate(certificate.statement, schema())
    content = content_of(Certificate.from_json(certificate.to_json()))
    assert to_jsonable(content.subject) == to_jsonable(case().current)


@pytest.mark.parametrize("name", ["ties", "policy", "transient", "cost"])
def test_schema_and_types_refuse_the_same(name):
    statement = json.loads(statement_of(replace(case(), tensors={"w": "ef" * 32})).to_json())
    statement["predicate"][name] = 7
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(statement, schema())
    with pytest.raises(InputError, match=name):
        content_of(Certificate(statement))
