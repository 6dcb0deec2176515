"""`weightproof.attach` under DeepSpeed: steps are counted where they are over, nothing rejected comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zero_attached
from worlds import run_world
from zero_engines import Setup

SETUPS = [Setup(1), Setup(2, torch.bfloat16), Setup(3), Setup(3, torch.bfloat16)]


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.label)
def test_a_loop_of_ones_own_on_an_engine(setup, tmp_path):
    first, second = run_world(zero_attached.attached, 2, setup, str(tmp_path), timeout=400)
    assert first == second
    assert first["after the rollback"] == []
    assert first["edits"] == ["kept", "restored"]
    assert first["after the rejected save"] == []
    assert "rejected holds rejected weights: do not use it. DEEPSPEED writes weights before" in first["rejected"]
    assert not (Path(tmp_path) / "rejected" / "guard_state.json").exists()
    assert first["moved"]

    first, second = run_world(zero_attached.resumed, 2, setup, str(tmp_path), timeout=400)
    assert first == second
    assert first["windows"]
