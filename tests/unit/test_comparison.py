"""Two model folders, read as a session reads the two models: the same numbers, whatever the files look like."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import build

from weightproof import GuardSession
from weightproof.comparison import compare_folders
from weightproof.edits import RTN
from weightproof.policy import load_policy
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
