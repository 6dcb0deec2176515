"""Moments of DeepSpeed's flat masters: kept and put back, so that a run goes on as one that never suffered a fault."""

from __future__ import annotations

import pytest
import torch
from worlds import run_world
from zero_engines import Setup, engine_of, join, small_llama, step
from zero_runs import copies, differing, masters_of, parts

from weightproof.snapshot import Snapshot
from weightproof_callbacks.training_state import TrainingState, clear_optimizer_state, require_restorable

SETUPS = [
    Setup(1, torch.bfloat16, accumulate="fp32"),
    Setup(2),
    Setup(3, torch.bfloat16, sub_group_size=2000),
    Setup(3, offload=True),
]


def taken_back(rank, size, setup, clear):
    join(size)
    engine, twin = engine_of(small_llama(), setup), engine_of(small_llama(), setup)
    require_restorable(engine.optimizer, engine.module)
    for seed in (1, 2):
        step(engine, seed)
        step(twin, seed)
    weights = Snapshot.capture(engine.module, companions=masters_of(engine).tensors())
    state = TrainingState.capture(optimizer=engine.optimizer)
    assert any("exp_avg" in name for name in state.tensors())
    for held in engine.optimizer.optimizer.state.values():
        held["exp_avg"].fill_(1e3)
    step(engine, 3)
    if clear:
        clear_optimizer_state(engine.optimizer)
    weights.restore()
    state.restore()
    for seed in (3, 4):
        step(engine, seed)
        step(twin, seed)
    return {
        "weights": differing(parts(engine), parts(twin)),
        "masters": differing(copies(masters_of(engine)), copies(masters_of(twin))),
        "state": TrainingState.capture(optimizer=engine.optimizer).digest
        == TrainingState.capture(optimizer=twin.optimizer).digest,
        "words": state.covered[0],
    }


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.label)
@pytest.mark.parametrize("clear", [False, True], ids=["in place", "cleared"])
def test_a_run_taken_back_equals_its_twin(setup, clear):
    for facts in run_world(taken_back, 2, setup, clear, timeout=240):
        assert not facts["weights"]
        assert not facts["masters"]
        assert facts["state"]
        assert facts["words"].startswith("optimizer AdamW, the state of")
