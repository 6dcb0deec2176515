"""`GuardCallback` in a Trainer on DeepSpeed: windows, an edit at a step, and a rollback that training survives."""

from __future__ import annotations

import json

import pytest
import torch
import zero_trainer
from worlds import run_world
from zero_engines import Setup


@pytest.mark.parametrize("setup", [Setup(2), Setup(3, torch.bfloat16)], ids=lambda setup: setup.label)
def test_a_trainer_on_deepspeed_is_guarded(setup, tmp_path):
    for one in run_world(zero_trainer.trained, 2, setup, str(tmp_path), timeout=400):
        assert (one["engine"], one["steps"]) == ("DeepSpeedEngine", 8)
        assert one["history"] == [
            (2, "train", "KEEP", "kept"),
            (4, "train", "KEEP", "kept"),
            (4, "rtn-int8-channel", "KEEP", "kept"),
            (6, "train", "ROLLBACK", "restored"),
            (8, "train", "KEEP", "kept"),
        ]
        assert one["cleared"] == [2]  # a flat master for each of the Trainer's two parameter groups
        assert one["stale"] == ()
        assert one["finite"] is True
        assert 0.0 < one["largest"] < 10.0
    certificate = json.loads((tmp_path / "weightproof" / "certificate.json").read_bytes())
    assert certificate["predicate"]["world_size"] == 2
