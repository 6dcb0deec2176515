"""Verification: an honest certificate holds on another copy of the files; every attack is rejected, and named.

"Rejected" alone would be little: each case says which file, tensor, matrix or step must be named.
"""

import copy
import json
import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from architectures import build
from safetensors.torch import load_file, save_file

from weightproof import Certificate, GuardSession, InputError, edits, kinds, signing
from weightproof.certificate import schema
from weightproof.certifying.certification import Request, certify_folders
from weightproof.certifying.form import content_of
from weightproof.certifying.model_pair import Data
from weightproof.cli import main
from weightproof.folders.jsonable import canonical_json
from weightproof.judgement.case_file import Base, CaseFile, statement_of
from weightproof.judgement.evidence import not_tested, step_json
from weightproof.judgement.judging import Judged, decide_on, judge_all
from weightproof.policy import decision_digest, evidence_digest, load_policy
from weightproof.readings.readings_json import readings_json
from weightproof.snapshots.tensor_store import model_digest
from weightproof.transactions.steps import Step
from weightproof.types import Action
from weightproof.verify import Demands, Status, verify

DOWN = "model.layers.1.mlp.down_proj.weight"
INT8 = kinds.Quantize(8)
KEY = signing.generate_key()
TRUSTED = (KEY.public_key(),)


@dataclass(frozen=True)
class Scene:
    """Two model folders, the data and the signed certificate of the change between them."""

    base: Path
    subject: Path
    retain: Path
    certificate: Path

    def demands(self, **changes: Any) -> Demands:
        return replace(Demands(keys=TRUSTED, base=self.base, data=Data(retain=self.retain)), **changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny model, the same model with its weights at eight bits, sixty windows of text, a certificate."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    model = build("llama")
    model.save_pretrained(folder / "base")
    session = GuardSession(model)
    session.apply(edits.RTN(8))
    model.save_pretrained(folder / "int8")
    (folder / "session.json").write_text(session.certificate().to_json())
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, model.config.vocab_size, (60, 90), generator=generator).tolist()
    (folder / "retain.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    request = Request(
        base=folder / "base",
        subject=folder / "int8",
        policy=load_policy("balanced"),
        kind=kinds.Quantize(8),
        data=Data(retain=folder / "retain.jsonl"),
    )
    certify_folders(request).certificate.save(folder / "certificate.json", KEY)
    return folder


@pytest.fixture
def scene(made, tmp_path):
    """Copies of everything, as a stranger would have them."""
    for name in ("base", "int8"):
        shutil.copytree(made / name, tmp_path / name)
    for name in ("retain.jsonl", "certificate.json", "session.json"):
        shutil.copy(made / name, tmp_path / name)
    return Scene(tmp_path / "base", tmp_path / "int8", tmp_path / "retain.jsonl", tmp_path / "certificate.json")


def statement_in(path: Path) -> dict[str, Any]:
    return json.loads(Certificate.load(path).to_json())


def sign(statement: dict[str, Any], path: Path, key: Any = KEY) -> Path:
    """What an insider could do: any statement with a good signature."""
    return Certificate(statement).save(path, key)


def named(found, *words: str) -> bool:
    """Whether some difference has all of these words."""
    return any(all(word in str(one) for word in words) for one in found.differences)


# ---------------------------------------------------------------- the honest certificate


@pytest.mark.parametrize("level", [1, 2, 3])
def test_an_honest_certificate_is_valid_on_another_copy(scene, level):
    found = verify(scene.certificate, scene.subject, level, scene.demands())
    assert found.status is Status.VALID, (found.differences, found.unchecked)
    assert found.signed_by == (signing.key_id(TRUSTED[0]),)
    assert found.action == "KEEP"
    said = " ".join(found.checked)
    assert ("signature" in said, "verdicts" in said, "nll on retain data" in said) == (True, level > 1, level > 2)


def test_level_2_without_the_base_says_what_it_took_on_trust(scene):
    found = verify(scene.certificate, scene.subject, 2, scene.demands(base=None))
    assert found.status is Status.VALID
    assert any("--base" in note for note in found.notes)


def test_level_3_without_the_base_is_undecided(scene):
    found = verify(scene.certificate, scene.subject, 3, scene.demands(base=None))
    assert found.status is Status.UNDECIDED
    assert any("--base" in line for line in found.unchecked)


def test_level_3_with_other_data_is_undecided_and_names_the_data(scene):
    lines = scene.retain.read_text().splitlines()
    scene.retain.write_text("\n".join(lines[1:]) + "\n")
    found = verify(scene.certificate, scene.subject, 3, scene.demands())
    assert found.status is Status.UNDECIDED
    assert any("nll on retain data" in line and "other windows" in line for line in found.unchecked)


def test_every_certificate_fits_the_schema(scene):
    for name in ("certificate.json", "session.json"):
        jsonschema.validate(statement_in(scene.certificate.with_name(name)), schema())


def test_the_certificate_may_lie_in_the_folder(scene):
    for name in ("certificate.json", "evidence.json"):
        path = shutil.copy(scene.certificate, scene.subject / name)
        found = verify(path, scene.subject, 1, scene.demands())
        assert found.status is Status.VALID, found.differences
        assert any(name in note for note in found.notes)
    assert verify(scene.certificate, scene.subject, 1, scene.demands()).status is Status.INVALID  # of evidence.json


# ---------------------------------------------------------------- a model in memory


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_session_is_verified_against_the_folder_it_was_saved_to(scene, level):
    path = scene.certificate.with_name("session.json")
    found = verify(path, scene.subject, level, scene.demands(keys=(), unsigned_ok=True))
    assert found.status is Status.VALID, (found.differences, found.unchecked)
    assert any("in memory" in note for note in found.notes)
    other = verify(path, scene.base, 1, scene.demands(keys=(), unsigned_ok=True))
    assert named(other, f"tensor {DOWN}", "digest")


def test_tied_tensors_and_buffers_of_a_model_in_memory_need_not_be_in_the_folder(tmp_path):
    torch.manual_seed(0)
    model = build("gpt2")
    certificate = GuardSession(model).certificate()
    model.save_pretrained(tmp_path)
    tied = certificate.predicate["ties"]
    assert tied, "the model of this test has tied weights"
    found = verify(certificate, tmp_path, 2, Demands(unsigned_ok=True))
    assert found.status is Status.VALID, found.differences
    tensors = load_file(tmp_path / "model.safetensors")
    stored, other = next((one, names[0]) for one, names in tied.items())
    kept = stored if stored in tensors else other
    tensors[other if kept == stored else stored] = tensors[kept].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert verify(certificate, tmp_path, 1, Demands(unsigned_ok=True)).status is Status.VALID
    tensors[other if kept == stored else stored] += 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert verify(certificate, tmp_path, 1, Demands(unsigned_ok=True)).status is Status.INVALID


def test_a_long_session_is_judged_again_step_by_step(tmp_path):
    torch.manual_seed(0)
    model = build("llama")
    session = GuardSession(model)
    session.apply(edits.RTN(8))
    session.apply(edits.RTN(6))
    with session.edit("broken"), torch.no_grad():
        model.get_parameter(DOWN).fill_(float("nan"))
    assert [step.applied for step in session.history] == ["kept", "kept", "restored"]
    model.save_pretrained(tmp_path)
    certificate = Certificate.from_json(session.certificate().to_json())
    jsonschema.validate(certificate.statement, schema())
    found = verify(certificate, tmp_path, 2, Demands(unsigned_ok=True))
    assert found.status is Status.VALID, found.differences
    assert "verdicts of 2 steps from their readings, decisions of 3 steps" in found.checked
    assert found.action == "ROLLBACK"


# ---------------------------------------------------------------- attacks on files


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def rename_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj_.weight"] = tensors.pop(DOWN)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[DOWN]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def swap_tensors(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    other = DOWN.replace("layers.1", "layers.0")
    tensors[DOWN], tensors[other] = tensors[other], tensors[DOWN]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


ATTACKS_ON_FILES = {
    "one bit flipped": (lambda f: flip(f / "model.safetensors"), ["file model.safetensors", "sha256"], ["tensor "]),
    "weights cut short": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-7]),
        ["file model.safetensors", "sha256"],
        ["weights", "complete safetensors"],
    ),
    "tensor renamed": (rename_tensor, [f"tensor {DOWN}", "nothing"], ["down_proj_.weight", "extra tensor"]),
    "tensor missing": (drop_tensor, [f"tensor {DOWN}", "found nothing"], ["file model.safetensors"]),
    "tensors swapped": (swap_tensors, [f"tensor {DOWN}", "digest"], ["layers.0.mlp.down_proj"]),
    "extra file": (lambda f: (f / "extra.py").write_text("x"), ["extra.py", "extra file"], []),
    "extra hidden file": (lambda f: (f / ".pth").write_text("x"), [".pth", "extra file"], []),
    "file missing": (lambda f: (f / "generation_config.json").unlink(), ["generation_config", "found nothing"], []),
    "config changed": (
        lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace("silu", "gelu")),
        ["file config.json", "sha256"],
        [],
    ),
}


@pytest.mark.parametrize("attack", ATTACKS_ON_FILES)
def test_attacks_on_the_folder_are_named(scene, attack):
    change, *expected = ATTACKS_ON_FILES[attack]
    change(scene.subject)
    found = verify(scene.certificate, scene.subject, 1, scene.demands())
    assert found.status is Status.INVALID
    for words in expected:
        assert named(found, *words), found.differences


def test_another_model_in_place_of_the_subject_is_named(scene):
    """An old certificate replayed for a new model, or a subject swapped: the same thing to a verifier."""
    found = verify(scene.certificate, scene.base, 1, scene.demands())
    assert found.status is Status.INVALID
    assert named(found, "file model.safetensors", "sha256")
    assert named(found, f"tensor {DOWN}", "digest")


def test_resharded_weights_are_accepted_only_on_request(scene):
    tensors = load_file(scene.subject / "model.safetensors")
    (scene.subject / "model.safetensors").unlink()
    places = {}
    for index, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        file = f"model-0000{index}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, scene.subject / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    (scene.subject / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert verify(scene.certificate, scene.subject, 1, scene.demands()).status is Status.INVALID
    for level in (1, 2):
        found = verify(scene.certificate, scene.subject, level, scene.demands(resharded=True))
        assert found.status is Status.VALID, found.differences
    (scene.subject / "extra.txt").write_text("x")
    assert named(verify(scene.certificate, scene.subject, 1, scene.demands(resharded=True)), "extra.txt")


@pytest.mark.parametrize("level", [1, 2, 3])
def test_an_unsafe_folder_is_refused_in_a_sentence(scene, level, tmp_path):
    (tmp_path / "secret").write_text("not yours")
    (scene.subject / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="leads out"):
        verify(scene.certificate, scene.subject, level, scene.demands())


# ---------------------------------------------------------------- attacks on the certificate


def test_another_key_is_not_believed(scene):
    sign(statement_in(scene.certificate), scene.certificate, signing.generate_key())
    found = verify(scene.certificate, scene.subject, 1, scene.demands())
    assert [one.where for one in found.differences] == ["signature"]
    assert found.signed_by == ()


def test_a_signature_taken_away_is_not_believed(scene):
    Certificate(statement_in(scene.certificate)).save(scene.certificate)
    found = verify(scene.certificate, scene.subject, 1, scene.demands())
    assert named(found, "signature", "no signature")


def test_without_a_key_nobody_vouches_for_it(scene):
    found = verify(scene.certificate, scene.subject, 1, scene.demands(keys=()))
    assert found.status is Status.UNDECIDED
    assert found.signed_by == ()
    assert any("nobody vouches" in line for line in found.unchecked)
    accepted = verify(scene.certificate, scene.subject, 1, scene.demands(keys=(), unsigned_ok=True))
    assert accepted.status is Status.VALID
    assert any("nobody vouches" in line for line in accepted.notes)


def test_one_changed_number_breaks_the_signature(scene):
    envelope = json.loads(scene.certificate.read_text())
    changed = statement_in(scene.certificate)
    changed["predicate"]["readings"]["subject"]["matrices"][DOWN]["spectral_norm"] *= 1.01
    envelope["payload"] = signing.Envelope(
        Certificate(changed).canonical(), signing.PAYLOAD_TYPE, (signing.Signature("", b"x"),)
    ).to_json()["payload"]
    scene.certificate.write_text(json.dumps(envelope))
    found = verify(scene.certificate, scene.subject, 1, scene.demands())
    assert [one.where for one in found.differences] == ["signature"]


def change(predicate: dict[str, Any], path: str, value: Any) -> None:
    *above, last = path.split("/")
    for part in above:
        predicate = predicate[int(part)] if isinstance(predicate, list) else predicate[part]
    key: Any = int(last) if isinstance(predicate, list) else last
    assert predicate[key] != value, path
    predicate[key] = value


# Path in the predicate, a value, what is named. Signed by the trusted key: an insider, or a stolen key.
LIES_WITHIN = {
    "limit of the policy": ("policy/resolved/limits/divergence/kl", 0.5, ["policy", "digest"]),
    "name of the policy": ("policy/name", "conservative", ["policy", "name"]),
    "digest of the policy": ("policy/digest", "ab" * 32, ["policy", "digest"]),
    "action": ("decision/action", "ROLLBACK", ["decision", "action"]),
    "action of the step": ("steps/0/action", "ROLLBACK", ["step 0", "evidence_digest"]),
    "assurance": ("assurance", "none", ["assurance"]),
    "outcome of a guard": ("steps/0/verdicts/1/outcome", "FAIL", ["step 0", "evidence_digest"]),
    "a measurement": ("steps/0/verdicts/0/measurements/0/value", 0.25, ["step 0", "evidence_digest"]),
    "measurements left out": ("steps/0/verdicts/0/num_measurements", 1, ["num_measurements"]),
    "loss of the step": ("steps/0/losses/0/after", 1.0, ["step 0", "losses"]),
    "outputs of the step": ("steps/0/divergence/0/kl", 0.0, ["step 0", "divergence"]),
    "digest after": ("steps/0/record/digest_after", "ab" * 32, ["step 0", "record"]),
    "model digest": ("baseline/model_digest", "ab" * 32, ["baseline", "model_digest"]),
    "digest of a tensor": (f"readings/subject/tensors/{DOWN}/digest", "ab" * 32, [f"subject {DOWN}", "digest"]),
    "digest of readings": ("readings/subject/model_digest", "ab" * 32, ["readings subject", "model_digest"]),
    "form": ("world_size", "two", ["predicate.world_size", "whole number"]),
}


@pytest.mark.parametrize("lie", LIES_WITHIN)
def test_a_lie_that_contradicts_the_certificate_is_found_at_level_1(scene, lie):
    path, value, words = LIES_WITHIN[lie]
    statement = statement_in(scene.certificate)
    change(statement["predicate"], path, value)
    sign(statement, scene.certificate)
    found = verify(scene.certificate, scene.subject, 1, scene.demands())
    assert found.status is Status.INVALID
    assert named(found, *words), found.differences


def test_a_swapped_policy_is_named(scene):
    statement = statement_in(scene.certificate)
    aggressive = load_policy("aggressive")
    policy = {"name": aggressive.name, "digest": aggressive.digest, "resolved": json.loads(canonical_json(aggressive))}
    statement["predicate"]["policy"] = policy
    sign(statement, scene.certificate)
    found = verify(scene.certificate, scene.subject, 1, scene.demands())
    assert named(found, "policy", "digest in the newest step")
    demanded = verify(scene.certificate, scene.subject, 1, scene.demands(policy=load_policy("balanced")))
    assert named(demanded, "policy", "as demanded", "balanced", "aggressive")


def test_a_swapped_subject_is_named(scene):
    """The certificate is made to be about the base: its list of tensors is no longer that of its readings."""
    statement = statement_in(scene.certificate)
    ours = Certificate(statement)
    base = {name: one["digest"] for name, one in ours.predicate["readings"]["baseline"]["tensors"].items()}
    swapped = Certificate.build(
        subject_name="base",
        model_digest=model_digest(base),
        predicate=ours.predicate,
        files=ours.predicate["baseline"]["files"],
        tensors=base,
    )
    swapped.save(scene.certificate, KEY)
    found = verify(scene.certificate, scene.base, 1, scene.demands())
    assert found.status is Status.INVALID
    assert named(found, f"subject {DOWN}", "digest")


# ---------------------------------------------------------------- signed lies that are consistent in themselves


def retell(statement: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Change the readings of the subject, and everything in the certificate that follows from them by copying.

    The verdicts stay as they were, and every digest inside is computed again, as a careful liar would do it.
    """
    statement = copy.deepcopy(statement)
    predicate = statement["predicate"]
    change(predicate["readings"]["subject"], path, value)
    content = content_of(Certificate(statement))
    [step] = predicate["steps"]
    subject = readings_json(content.subject)
    step["record"], step["divergence"], step["losses"] = (subject[n] for n in ("edit", "divergence", "losses"))
    return statement


def judged_anew(statement: dict[str, Any], kind: kinds.Kind = INT8) -> dict[str, Any]:
    """The same with the verdicts that the changed readings give: nothing inside contradicts anything."""
    content = content_of(Certificate(statement))
    policy = load_policy("balanced")
    judged = Judged(content.baseline, content.baseline, content.subject)
    step = Step("int8", 1, kind)
    step.settle(decide_on(policy, judge_all(policy, judged), kind=kind.name, step=1, world_size=1), judged)
    form = content.predicate
    case = CaseFile(
        subject_name=content.certificate.subject_name,
        tensors=content.certificate.tensors,
        files=content.certificate.files,
        baseline=Base(
            readings=content.baseline,
            created_at=form.baseline.created_at,
            environment=form.baseline.environment,
            name=form.baseline.name,
            files=form.baseline.files,
        ),
        current=content.subject,
        policy=policy,
        windows=statement["predicate"]["windows"],
        steps=[step_json(step)],
        environment=form.environment,
        created_at=form.created_at,
        ties=form.ties,
        not_tested=not_tested(content.subject, step.decision),
    )
    return json.loads(statement_of(case).to_json())


# Path in the subject's readings, factor or value, level that finds it, what is named.
SIGNED_LIES = {
    "spectral norm": (f"matrices/{DOWN}/spectral_norm", 1.2, 2, [DOWN, "spectral_norm"]),
    "Frobenius norm": (f"matrices/{DOWN}/frobenius_norm", 1.001, 2, [DOWN, "frobenius_norm"]),
    "zero rows": (f"matrices/{DOWN}/zero_rows", 3, 2, [DOWN, "zero_rows"]),
    "spikes": (f"bulks/{DOWN}/num_spikes", 25, 2, [DOWN, "num_spikes"]),
    "non-finite elements": (f"tensors/{DOWN}/num_nonfinite", 5, 2, [DOWN, "num_nonfinite"]),
    "size of the change": (f"edit/relative_delta/{DOWN}", 0.5, 2, [DOWN, "relative_delta"]),
    "contract": ("edit/contract/0/value", 0.0, 2, ["levels_per_group"]),
    "divergence": ("divergence/0/kl", 0.0125, 3, ["outputs on random windows", "kl"]),
    "loss": ("losses/0/upper", -0.5, 3, ["nll on retain data", "upper"]),
    "second moment": ("second_moments/*", 1.1, 3, ["subject", "second moment"]),
}


@pytest.mark.parametrize("lie", SIGNED_LIES)
def test_a_signed_lie_that_is_consistent_is_found_in_weights_or_outputs(scene, lie):
    path, value, level, words = SIGNED_LIES[lie]
    statement = statement_in(scene.certificate)
    subject = statement["predicate"]["readings"]["subject"]
    if path.endswith("/*"):
        path = f"second_moments/{next(iter(subject['second_moments']))}"
    if path.split("/")[-1] in ("spectral_norm", "frobenius_norm") or "moment" in path:
        found: Any = subject
        for part in path.split("/"):
            found = found[int(part)] if isinstance(found, list) else found[part]
        value *= found  # a factor
    if "num_spikes" in path:
        for end in ("num_spikes_low", "num_spikes_high"):
            subject["bulks"][DOWN][end] = value
    consistent = judged_anew(retell(statement, path, value))
    sign(consistent, scene.certificate)
    quiet = verify(scene.certificate, scene.subject, level - 1, scene.demands())
    assert quiet.status is not Status.INVALID, quiet.differences
    found = verify(scene.certificate, scene.subject, level, scene.demands())
    assert found.status is Status.INVALID
    assert named(found, *words), found.differences


# What a liar leaves out of subject and baseline: a guard that reads nothing finds nothing. Level, what is named.
LEFT_OUT = {
    "bulks": (2, [DOWN, "bulk"]),
    "circuits": (2, ["circuit"]),
    "second_moments": (3, ["second moment"]),
    "structure/modules": (3, ["modules"]),
    "structure/embedding_sizes": (3, ["embed_tokens"]),
}


@pytest.mark.parametrize("what", LEFT_OUT)
def test_readings_left_out_are_missed(scene, what):
    level, words = LEFT_OUT[what]
    statement = statement_in(scene.certificate)
    for side in ("baseline", "subject"):
        readings = statement["predicate"]["readings"][side]
        readings.pop("order")
        change(readings, what, {})
    sign(judged_anew(statement), scene.certificate)
    assert verify(scene.certificate, scene.subject, level - 1, scene.demands()).status is Status.VALID
    found = verify(scene.certificate, scene.subject, level, scene.demands())
    assert named(found, "subject", *words), found.differences
    assert named(found, "baseline", *words), found.differences


@pytest.mark.parametrize("what", ["divergence", "losses"])
def test_outputs_and_losses_left_out_are_measured_here_and_said(scene, what):
    statement = statement_in(scene.certificate)
    statement["predicate"]["readings"]["subject"][what] = []
    sign(judged_anew(statement), scene.certificate)
    found = verify(scene.certificate, scene.subject, 3, scene.demands())
    assert found.status is Status.VALID  # it says what it does not know, and what it does not say would change nothing
    assert any("the certificate holds no" in note for note in found.notes)


def test_a_loss_left_out_that_would_have_rejected_is_not_valid(scene):
    tensors = load_file(scene.subject / "model.safetensors")
    tensors["lm_head.weight"] += 0.1 * torch.randn(tensors["lm_head.weight"].shape)
    save_file(tensors, scene.subject / "model.safetensors", metadata={"format": "pt"})
    strict = load_policy("balanced").override(
        {"loss": {"tau": 1.0}, "divergence": {"kl": 100.0, "hidden_error": 100.0}}
    )
    request = Request(base=scene.base, subject=scene.subject, policy=strict)
    certified = certify_folders(request)  # without data: outputs decide, and this policy asks little of them
    assert certified.decision.action is Action.KEEP
    certified.certificate.save(scene.certificate, KEY)
    assert verify(scene.certificate, scene.subject, 3, scene.demands(data=Data())).status is Status.VALID
    found = verify(scene.certificate, scene.subject, 3, scene.demands())
    assert found.status is Status.UNDECIDED
    assert any("no nll on retain data" in line and "ROLLBACK" in line for line in found.unchecked)


def test_a_decision_without_what_it_was_judged_from_is_not_valid(scene):
    statement = statement_in(scene.certificate)
    statement["predicate"]["steps"][0]["judged_on"] = None
    sign(statement, scene.certificate)
    found = verify(scene.certificate, scene.subject, 2, scene.demands())
    assert found.status is Status.UNDECIDED
    assert any("step 0 (int8)" in line and "judged from" in line for line in found.unchecked)


@pytest.mark.parametrize("side", ["before", "reference"])
def test_a_decision_judged_against_another_baseline_is_found(scene, side):
    statement = statement_in(scene.certificate)
    predicate = statement["predicate"]
    fake = copy.deepcopy(predicate["readings"]["baseline"])
    if side == "before":
        fake["matrices"][DOWN]["spectral_norm"] *= 5
    else:
        fake["tensors"][DOWN]["dtype"] = "bfloat16"
    predicate["readings"]["fake"] = fake
    predicate["steps"][0]["judged_on"][side] = "fake"
    sign(statement, scene.certificate)
    found = verify(scene.certificate, scene.subject, 2, scene.demands(base=None))
    assert named(found, "step 0 (int8)", f"({side})", "those of the baseline"), found.differences


def test_what_was_not_measured_must_be_said(scene):
    statement = statement_in(scene.certificate)
    statement["predicate"]["not_tested"] = []
    sign(statement, scene.certificate)
    found = verify(scene.certificate, scene.subject, 2, scene.demands(base=None))
    assert named(found, "not_tested", "no target data"), found.differences


# Path in the subject's readings, value, level that finds it, what is named: fields that no guard measures by itself.
QUIET_LIES = {
    "an inf that counts as a mask": (f"tensors/{DOWN}/is_buffer", True, 2, [DOWN, "is_buffer"]),
    "a count of NaN": (f"tensors/{DOWN}/num_nan", 3, 2, [DOWN, "num_nan"]),
    "another method of counting": (f"bulks/{DOWN}/family", "head", 2, [DOWN, "family"]),
    "another name inside": (f"matrices/{DOWN}/name", "other", 1, [DOWN, "name"]),
    "where a test stopped": ("losses/0/tokens_used", 7, 1, ["nll on retain data", "tokens_used"]),
    "why nobody may decide": ("losses/0/undecided", "too few", 3, ["nll on retain data", "decides"]),
    "a surer interval": ("losses/0/confidence", 0.999, 3, ["nll on retain data", "confidence"]),
    "a correction": ("edit/corrections", [DOWN], 1, ["corrections", DOWN]),
    "a warm-up": ("in_warmup", True, 1, ["in_warmup"]),
}


@pytest.mark.parametrize("lie", QUIET_LIES)
def test_lies_in_fields_that_carry_no_verdict_are_found(scene, lie):
    path, value, level, words = QUIET_LIES[lie]
    sign(judged_anew(retell(statement_in(scene.certificate), path, value)), scene.certificate)
    if level > 1:
        assert verify(scene.certificate, scene.subject, level - 1, scene.demands()).status is not Status.INVALID
    found = verify(scene.certificate, scene.subject, level, scene.demands())
    assert named(found, *words), found.differences


def test_another_file_of_the_base_is_named(scene):
    (scene.base / "generation_config.json").write_text("{}")
    found = verify(scene.certificate, scene.subject, 2, scene.demands())
    assert named(found, "file generation_config.json of the base")


def test_two_folders_are_never_judged_as_a_window_of_training(scene):
    statement = statement_in(scene.certificate)
    edit = statement["predicate"]["readings"]["subject"]["edit"]
    edit |= {"kind": "train", "params": {}, "contract": []}
    sign(judged_anew(statement, kinds.Plain("train")), scene.certificate)
    found = verify(scene.certificate, scene.subject, 1, scene.demands())
    assert named(found, "step 0 (int8)", "kind", "train"), found.differences


@pytest.mark.parametrize("lie", ["spectral norm", "divergence", "loss"])
def test_numbers_changed_under_old_verdicts_are_found_by_judging_again(scene, lie):
    path, _, _, _ = SIGNED_LIES[lie]
    statement = retell(statement_in(scene.certificate), path, 123.0)
    sign(statement, scene.certificate)
    assert verify(scene.certificate, scene.subject, 1, scene.demands(base=None)).status is Status.VALID
    found = verify(scene.certificate, scene.subject, 2, scene.demands(base=None))
    guard = {"spectral norm": "spectral", "divergence": "divergence", "loss": "loss"}[lie]
    assert named(found, f"step 0 (int8), {guard}"), found.differences


def test_a_verdict_left_out_is_missed(scene):
    statement = statement_in(scene.certificate)
    [step] = statement["predicate"]["steps"]
    step["verdicts"] = [one for one in step["verdicts"] if one["guard"] != "loss"]
    decision = content_of(Certificate(statement)).predicate.steps[0].decision
    step["decision_digest"], step["evidence_digest"] = decision_digest(decision), evidence_digest(decision)
    statement["predicate"]["decision"] |= {n: step[n] for n in ("decision_digest", "evidence_digest")}
    sign(statement, scene.certificate)
    assert verify(scene.certificate, scene.subject, 1, scene.demands()).status is Status.VALID
    found = verify(scene.certificate, scene.subject, 2, scene.demands(base=None))
    assert named(found, "step 0 (int8), loss", "verdict")


def test_a_lie_about_the_base_is_found_where_the_base_is_given(scene):
    statement = statement_in(scene.certificate)
    statement["predicate"]["readings"]["baseline"]["matrices"][DOWN]["frobenius_norm"] *= 1.01
    sign(judged_anew(statement), scene.certificate)
    found = verify(scene.certificate, scene.subject, 2, scene.demands())
    assert named(found, f"baseline {DOWN}", "frobenius_norm")


def test_another_base_is_named(scene):
    flip(scene.base / "model.safetensors")
    found = verify(scene.certificate, scene.subject, 2, scene.demands())
    assert found.status is Status.INVALID
    assert any("of the base" in one.where for one in found.differences)


# ---------------------------------------------------------------- chain


def test_a_chain_holds_only_with_the_very_parent(scene, tmp_path):
    parent = Certificate.load(scene.certificate)
    request = Request(
        base=scene.subject,
        subject=scene.base,
        policy=load_policy("balanced"),
        weights_only=True,
        parent=parent,
    )
    child = certify_folders(request).certificate
    child.save(tmp_path / "child.json", KEY)
    good = scene.demands(parent=parent, base=None)
    found = verify(tmp_path / "child.json", scene.base, 1, good)
    assert found.status is Status.VALID, found.differences
    assert "the parent certificate" in found.checked
    unsaid = verify(tmp_path / "child.json", scene.base, 1, scene.demands(base=None))
    assert any("goes on from certificate" in note for note in unsaid.notes)
    other = Certificate.load(tmp_path / "session.json")
    assert named(verify(tmp_path / "child.json", scene.base, 1, scene.demands(parent=other)), "parent", "digest")
    assert named(verify(scene.certificate, scene.subject, 1, good), "parent", "digest")


# ---------------------------------------------------------------- command line


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["verify", *map(str, arguments)])
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out, said.err


def test_the_command_line_answers_with_codes_and_sentences(scene, tmp_path, capsys):
    _, public = signing.write_key_pair(tmp_path / "signer", KEY)
    right = (scene.certificate, "--model", scene.subject, "--key", public)
    code, out, _ = run(capsys, *right, "--level", 2, "--base", scene.base, "--policy", "balanced")
    assert (code, out.splitlines()[0].startswith("valid at level 2")) == (0, True)
    code, out, _ = run(capsys, scene.certificate, "--model", scene.subject)
    assert code == 2
    assert "nobody vouches" in out
    code, out, _ = run(capsys, scene.certificate, "--model", scene.base, "--key", public)
    assert code == 1
    assert f"tensor {DOWN}: digest" in out
    code, out, _ = run(capsys, scene.certificate, "--model", scene.base, "--key", public, "--json")
    answer = json.loads(out)
    assert (code, answer["status"]) == (1, "invalid")
    assert {"where", "what", "expected", "found"} == answer["differences"][0].keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.json", "--model", "int8"], "none.json"),
        (["certificate.json", "--model", "none"], "none"),
        (["certificate.json", "--model", "int8", "--key", "signer"], "private key"),
        (["retain.jsonl", "--model", "int8"], "not a certificate"),
        (["certificate.json", "--model", "int8", "--policy", "bold"], "bold"),
    ],
)
def test_bad_input_is_one_sentence_and_code_3(scene, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(scene.base.parent)
    signing.write_key_pair("signer", KEY)
    code, _, err = run(capsys, *arguments)
    assert code == 3
    assert message in err
    assert err.count("\n") == 1


# ---------------------------------------------------------------- broken certificates


def test_any_damage_is_an_answer_or_a_sentence_never_a_crash(scene):
    """Values of another kind anywhere: a difference, or one clear refusal."""
    statement = statement_in(scene.certificate)
    junk = [None, True, -1, 1.5, "", "NaN", [], {}, [[]], {"a": 1}, "ab" * 32]
    rng = random.Random(0)
    answers = {"refused": 0, "invalid": 0}
    for _ in range(60):
        damaged = copy.deepcopy(statement)
        inner: Any = damaged
        for _ in range(rng.randint(1, 7)):
            key = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            if not isinstance(inner[key], dict | list) or not inner[key]:
                break
            inner = inner[key]
        key = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        inner[key] = rng.choice(junk)
        try:
            certificate = Certificate.from_json(json.dumps(damaged))
            found = verify(certificate, scene.subject, 1, Demands(unsigned_ok=True))
        except InputError:
            answers["refused"] += 1
            continue
        json.dumps(found.to_dict(), allow_nan=False)
        answers["invalid"] += found.status is Status.INVALID
    assert min(answers.values()) > 5
    assert sum(answers.values()) >= 50
