"""A `Trainer` run that suffers a fault and goes back equals, bit for bit, a twin that never suffered it."""

from __future__ import annotations

import pytest
import torch
from tests.support.twin_loops import trained
from tests.support.twins import require_batches, require_twins

KINDS = {
    "foreach-bf16": {"optim": "adamw_torch", "dtype": torch.bfloat16},
    "fused": {"optim": "adamw_torch_fused"},
}


@pytest.mark.parametrize("data", ["replay", "skip"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_taken_back_equals_its_twin(kind, data, tmp_path):
    order = {"train_sampling_strategy": "sequential"}
    ours = trained(data, tmp_path, **KINDS[kind], **order)
    twin = trained(None, tmp_path, skipped=data == "skip", **KINDS[kind], **order)
    require_twins(ours, twin)
    require_batches(data, ours, twin)


def test_the_window_is_replayed_across_the_end_of_a_shuffled_epoch(tmp_path):
    """5 steps an epoch, which Trainer counts: each later epoch begins before the last batches of the one before."""
    ours, twin = (trained(data, tmp_path, rows=40) for data in ("replay", None))
    require_twins(ours, twin)
    require_batches("replay", ours, twin)
    assert set(twin.seen[:10]) != set(twin.seen[10:])
