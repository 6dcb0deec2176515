"""Certificates of edits are recomputed from the folders: contracts by their parameters, or said not to be."""

from __future__ import annotations

import pytest
import torch
import trained_models

from weightproof import GuardSession, edits
from weightproof.verify import Demands, Status, verify

CASES = {
    "zero points": (edits.RTN(8, "group", 16, symmetric=False), True),
    "global pruning": (edits.Prune(0.05, scope="global"), True),
    "low rank": (edits.SVD(energy=0.995), True),
    "task arithmetic": (edits.TaskArithmetic({"transformer.h.0.mlp.c_fc.bias": torch.full((256,), 1e-3)}), True),
    # The second moments of the inputs are not in a certificate.
    "GPTQ": (edits.GPTQ(6), False),
}


@pytest.mark.parametrize("name", CASES)
def test_a_certificate_of_an_edit_is_recomputed_from_the_folders(name, tmp_path):
    edit, is_recomputed = CASES[name]
    model = trained_models.load("gpt2").model
    model.save_pretrained(tmp_path / "base")
    session = GuardSession(model)
    step = session.apply(edit)
    assert step.applied == "kept", step.decision.reason
    model.save_pretrained(tmp_path / "subject")
    path = session.certificate().save(tmp_path / "certificate.json")
    session.close()
    found = verify(path, tmp_path / "subject", 2, Demands(unsigned_ok=True, base=tmp_path / "base"))
    assert not found.differences, found.differences
    assert any("contract of" in line for line in found.unchecked) is not is_recomputed, found.unchecked
    assert found.status is (Status.VALID if is_recomputed else Status.UNDECIDED), found.unchecked


def test_a_low_rank_that_is_none_is_found_out(tmp_path):
    model = trained_models.load("gpt2").model
    model.save_pretrained(tmp_path / "base")
    session = GuardSession(model)
    session.apply(edits.SVD(energy=0.995))
    path = session.certificate().save(tmp_path / "certificate.json")
    session.close()
    trained_models.load("gpt2").model.save_pretrained(tmp_path / "subject")  # what was never truncated
    found = verify(path, tmp_path / "subject", 2, Demands(unsigned_ok=True, base=tmp_path / "base"))
    assert found.status is Status.INVALID
