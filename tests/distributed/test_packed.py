"""Packed weights in two processes: one decision, one model, whether it is kept or taken back."""

from __future__ import annotations

import warnings

import pytest
import torch
import trained_models
from torch import nn
from torch.ao.quantization import quantize_dynamic
from worlds import run_world

from weightproof import GuardSession, kinds
from weightproof.snapshots.tensor_store import tensor_digests
from weightproof.weights import iter_tensors


def _quantize(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it will drop these layers one day
        for layer in model.model.layers:
            quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8, inplace=True)


def guarded(rank: int, size: int, scale: float) -> tuple[str, str, str, dict[str, str], bool]:
    torch.set_num_threads(1)
    model = trained_models.load("llama").model
    windows = trained_models.calibration_windows("llama")
    with torch.no_grad():
        before = model(**windows[0]).logits
    session = GuardSession(model, retain=windows, timeout=60)
    with session.edit("int8", kinds.Quantize(8, "tensor")) as step:
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(scale)
        _quantize(model)
    held = tensor_digests({named.name: named.tensor.detach() for named in iter_tensors(model)})
    with torch.no_grad():
        same = torch.equal(model(**windows[0]).logits, before)
    session.close()
    return str(step.decision.action), str(step.applied), step.decision.digest, held, same


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("scale", "applied"), [(1.0, "kept"), (50.0, "restored")])
def test_two_processes_decide_as_one(scale, applied):
    trained_models.load("llama")  # trained once, not by each process
    first, second = run_world(guarded, 2, scale, timeout=120.0)
    assert first == second
    assert first[1] == applied
    assert first[4] is (applied == "restored")
    if applied == "kept":
        alone = guarded(0, 1, scale)
        assert (alone[0], alone[3]) == (first[0], first[3])
