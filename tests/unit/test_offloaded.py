"""Weights that accelerate has offloaded are refused by name at the start, or measured; never skipped."""

from __future__ import annotations

import pytest
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn

from weightproof import GuardSession
from weightproof.errors import BaselineError, SnapshotError
from weightproof.snapshot import Snapshot
from weightproof.weights import iter_weight_matrices

OFFLOADS = {
    "to the CPU": lambda model, folder: cpu_offload(model, execution_device="cpu"),
    "to disk": lambda model, folder: disk_offload(model, folder, execution_device="cpu"),
    "one layer to disk": lambda model, folder: dispatch_model(
        model, {"0": "cpu", "1": "disk"}, main_device="cpu", offload_dir=folder
    ),
}


def model():
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6))


@pytest.mark.parametrize("name", OFFLOADS)
def test_offloaded_weights_are_refused_by_name(name, tmp_path):
    offloaded = OFFLOADS[name](model(), tmp_path)
    matrices = {matrix.name: matrix.refusal for matrix in iter_weight_matrices(offloaded)}
    away = [found for found, refusal in matrices.items() if refusal is not None]
    assert away == (["1.weight"] if name == "one layer to disk" else ["0.weight", "1.weight"])
    assert all("offloaded" in matrices[found] and "load the model without" in matrices[found] for found in away)
    with pytest.raises(BaselineError, match=rf"^{away[0]} holds no dense values .*load the weights into memory"):
        GuardSession(offloaded)
    with pytest.raises(SnapshotError, match=r"meta device.*load the weights into memory"):
        Snapshot.capture(offloaded)


def test_a_dispatched_model_whose_weights_are_all_in_memory_is_measured():
    dispatched = dispatch_model(model(), {"0": "cpu", "1": "cpu"}, main_device="cpu", force_hooks=True)
    session = GuardSession(dispatched)
    readings = session.baseline.readings.matrices
    assert {name: reading.reason for name, reading in readings.items()} == {"0.weight": None, "1.weight": None}
