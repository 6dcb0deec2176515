"""Baselines on disk: read back whole, refused when altered or of another model."""

import copy

import pytest
import torch
from architectures import build

from weightproof import Baseline, BaselineError, GuardSession
from weightproof.readings.tensors import read_tensors


@pytest.fixture(scope="module")
def session():
    torch.manual_seed(0)
    return GuardSession(build("gpt2"))


def test_saved_baseline_reads_back_whole(session, tmp_path):
    session.baseline.save(tmp_path)
    again = Baseline.load(tmp_path)
    assert again.readings == session.baseline.readings
    assert again.environment == session.baseline.environment
    assert again.fits.keys() == session.baseline.fits.keys()
    for name, fit in session.baseline.fits.items():
        assert torch.equal(again.fits[name].singular_values, fit.singular_values)
        assert again.fits[name].threshold == fit.threshold


def test_loaded_baseline_serves_its_own_model_only(session, tmp_path):
    session.baseline.save(tmp_path)
    twin = copy.deepcopy(session.model)
    assert GuardSession(twin, baseline=tmp_path).model_digest == session.model_digest
    with torch.no_grad():
        twin.transformer.h[0].mlp.c_fc.weight.mul_(2)
    with pytest.raises(BaselineError, match=r"another model: .*c_fc.weight has other values"):
        GuardSession(twin, baseline=tmp_path)


def test_differences_are_named(session):
    other = build("llama")
    with pytest.raises(BaselineError, match=r"is missing from the model.*and \d+ more"):
        session.baseline.require_same_model(read_tensors(other, {}, ()))


@pytest.mark.parametrize("position", [0.2, 0.9])
def test_one_flipped_byte_is_refused(session, tmp_path, position):
    path = session.baseline.save(tmp_path)
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(BaselineError):
        Baseline.load(tmp_path)


def test_truncated_and_missing_files_are_refused(session, tmp_path):
    path = session.baseline.save(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BaselineError, match="torn"):
        Baseline.load(path)
    with pytest.raises(BaselineError, match="no baseline"):
        Baseline.load(tmp_path / "elsewhere")
