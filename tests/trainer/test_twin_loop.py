"""A loop on Accelerate that suffers a fault and goes back equals, bit for bit, a twin that never suffered it."""

from __future__ import annotations

import pytest
import torch
from tests.support.transactions import require_batches, require_twins
from tests.support.twin_loops import loop

from weightproof_callbacks.training_state import TrainingState

KINDS = {
    "foreach": {"foreach": True, "fused": False},
    "fused": {"fused": True},
    "foreach-bf16": {"foreach": True, "fused": False, "dtype": torch.bfloat16},
    "fused-bf16": {"fused": True, "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("data", ["replay", "skip"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_taken_back_equals_its_twin(kind, data):
    ours, twin = loop(data, **KINDS[kind]), loop(None, skipped=data == "skip", **KINDS[kind])
    require_twins(ours, twin)
    require_batches(data, ours, twin)


@pytest.mark.parametrize("order", ["global", "own"])
def test_the_window_is_replayed_across_the_end_of_a_shuffled_epoch(order):
    """5 steps an epoch: the safe point lies in the first, the run goes back from the second.

    An order drawn from the global generators is the twin's only if the fault leaves those alone: what it draws
    out of turn decides which batches come next.
    """
    ours, twin = (loop(data, rows=40, order=order, draws=order == "own", fused=True) for data in ("replay", None))
    require_twins(ours, twin)
    require_batches("replay", ours, twin)
    assert set(twin.seen[:10]) != set(twin.seen[10:]), "each epoch has an order of its own"


def test_a_run_taken_back_inside_of_a_step_equals_its_twin():
    """There the schedule has not stepped yet, neither at the safe point nor when the run goes back to it."""
    ours, twin = loop("replay", inside=True, fused=True), loop(None, fused=True)
    require_twins(ours, twin)
    require_batches("replay", ours, twin)


def test_without_the_training_state_the_runs_differ(monkeypatch):
    """The fault does matter: with the weights alone restored, the moments carry it on."""
    monkeypatch.setattr(TrainingState, "restore", lambda state, data: state._memory.skip(state._mark))
    ours, twin = loop("skip", fused=True), loop(None, skipped=True, fused=True)
    assert ours.seen[:8] + ours.seen[12:] == twin.seen
    with pytest.raises(AssertionError, match="other bits than its twin"):
        require_twins(ours, twin)
