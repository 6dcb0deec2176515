"""Two model folders, read as a session reads the two models: the same numbers, whatever the files look like."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import build
from safetensors.torch import load_file, save_file

from weightproof import GuardSession
from weightproof.certifying.comparison import compare_folders, read_folder
from weightproof.edits import RTN
from weightproof.errors import BaselineError, InputError
from weightproof.judgement.judging import judge_all
from weightproof.kinds import Prune
from weightproof.policy import load_policy
from weightproof.readings import changed_matrices
from weightproof.types import Outcome
from weightproof.weights import iter_weight_matrices

ARCHITECTURES = ("gpt2", "llama", "bert", "t5", "mixtral")
POLICY = load_policy("balanced")


def _int8(model):
    """The model with every readable matrix rounded to 8 bits, as `session.apply(RTN(8))` writes it."""
    edited = copy.deepcopy(model)
    edit = RTN(bits=8)
    with torch.no_grad():
        for matrix in iter_weight_matrices(edited):
            if matrix.refusal is None and edit.selects(matrix):
                matrix.load().copy_(edit.plan(matrix, None))
    return edited, edit.kind


def _session_readings(model, edited, kind):
    """Readings before and after of a session in which the weights of `model` become those of `edited`."""
    session = GuardSession(copy.deepcopy(model), policy=POLICY)
    with session.edit("subject", kind, on_violation="monitor"), torch.no_grad():
        for ours, theirs in zip(session.model.parameters(), edited.parameters(), strict=True):
            ours.copy_(theirs)
    readings = session.baseline.readings, session.current.readings
    session.close()
    return readings


def _of_files(readings, known):
    """What a folder can know of some readings: no buffers that are computed when a model is built."""
    return {name: reading for name, reading in readings.items() if name in known or not reading.is_buffer}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_two_folders_give_the_readings_of_a_session(name, tmp_path):
    model = build(name)
    edited, kind = _int8(model)
    model.save_pretrained(tmp_path / "base")
    edited.save_pretrained(tmp_path / "int8", max_shard_size="20KB")
    before, after = _session_readings(model, edited, kind)

    found = compare_folders(tmp_path / "base", tmp_path / "int8", POLICY, kind=kind)
    for ours, theirs in ((found.before, before), (found.after, after)):
        assert ours.tensors == _of_files(theirs.tensors, ours.tensors)
        assert ours.matrices == theirs.matrices
        assert ours.bulks == theirs.bulks
        assert ours.circuits == theirs.circuits
        assert ours.untrained == theirs.untrained
        sizes = theirs.structure.embedding_sizes
        assert ours.structure.embedding_sizes == {key: sizes[key] for key in ours.structure.embedding_sizes}
    assert after.edit is not None
    assert found.after.edit is not None
    assert found.after.edit.relative_delta == after.edit.relative_delta
    assert sorted(found.after.edit.contract, key=repr) == sorted(after.edit.contract, key=repr)
    assert found.after.edit.changed_names == after.edit.changed_names
    assert {matrix.method.split("-")[0] for matrix in found.after.matrices.values()} > {"delta"}
    assert found.tensors == {key: reading.digest for key, reading in found.after.tensors.items()}


def test_a_change_without_a_declaration_is_screened_and_what_did_not_change_is_not_read_again(tmp_path, monkeypatch):
    model = build("llama")
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(1.001)
    model.save_pretrained(tmp_path / "subject")
    read = []
    measured = changed_matrices.read_tracked

    def noted(matrix, *others):
        read.append(matrix.name)
        return measured(matrix, *others)

    monkeypatch.setattr(changed_matrices, "read_tracked", noted)
    found = compare_folders(tmp_path / "base", tmp_path / "subject", POLICY)
    assert read == ["model.layers.0.mlp.up_proj.weight"]
    assert found.after.edit is not None
    assert found.after.edit.relative_delta["model.layers.0.mlp.up_proj.weight"] == pytest.approx(0.001, rel=1e-3)
    assert found.after.matrices["model.layers.0.mlp.up_proj.weight"].method == "delta-frobenius"
    kept = [name for name in found.before.matrices if name not in read]
    assert all(found.after.matrices[name] is found.before.matrices[name] for name in kept)


def test_readings_are_of_the_content_and_not_of_the_files(tmp_path):
    model = build("mixtral")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    one, many = read_folder(tmp_path / "one"), read_folder(tmp_path / "many")
    assert one.readings == many.readings
    assert one.tensors == many.tensors
    assert set(one.files) != set(many.files)
    assert one.readings.tensors["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 96, 32)


def test_what_files_do_not_tell_is_named(tmp_path):
    build("gpt2").save_pretrained(tmp_path)
    unmeasured = read_folder(tmp_path).readings.unmeasured
    assert {"module_classes", "ties", "computed_buffers"} <= set(unmeasured)


def test_a_stack_that_lacks_an_expert_is_refused(tmp_path):
    build("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.block_sparse_moe.experts.1.w2.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="lacks expert 1"):
        read_folder(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    save_file({"a.weight": torch.ones(4, 4)}, tmp_path / "one.safetensors")
    save_file({"a.weight": torch.zeros(4, 4)}, tmp_path / "two.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"a\.weight is stored in two files"):
        read_folder(tmp_path)


def test_files_of_the_hugging_face_cache_are_links_within_it(tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    build("llama").save_pretrained(tmp_path / "plain")
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in (tmp_path / "plain").iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(blobs / path.name)
    assert read_folder(snapshot).files


def test_other_architectures_and_a_broken_base_are_refused(tmp_path):
    for name in ("gpt2", "llama"):
        build(name).save_pretrained(tmp_path / name)
    with pytest.raises(InputError, match=r"is a gpt2 and .* a llama"):
        compare_folders(tmp_path / "gpt2", tmp_path / "llama", POLICY)
    wider = build("llama", hidden_size=64, intermediate_size=96, vocab_size=80, head_dim=16)
    wider.save_pretrained(tmp_path / "wider")
    with pytest.raises(InputError, match="no tensor of one name and shape in common"):
        compare_folders(tmp_path / "llama", tmp_path / "wider", POLICY)
    broken = build("llama")
    with torch.no_grad():
        broken.get_parameter("model.norm.weight")[0] = float("inf")
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(BaselineError, match=r"model\.norm\.weight \(1\)"):
        compare_folders(tmp_path / "broken", tmp_path / "llama", POLICY)


def test_an_undeclared_change_is_found_by_the_guards(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.get_parameter("model.norm.weight").add_(0.5)
        model.get_parameter("model.layers.0.mlp.up_proj.weight").zero_()
    model.save_pretrained(tmp_path / "subject")
    found = compare_folders(
        tmp_path / "base", tmp_path / "subject", POLICY, kind=Prune(1.0), targets=["*.mlp.up_proj.weight"]
    )
    verdict = judge_all(POLICY, found.judged)["invariants"]
    failed = {(one.target, one.statistic) for one in verdict.measurements if one.outcome is Outcome.FAIL}
    assert ("model.norm.weight", "undeclared_change") in failed
    assert ("model.norm.weight", "contract_altered_outside_matrices") in failed
