"""ZeRO-3's partitions as the library reads them, against DeepSpeed's own."""

from __future__ import annotations

import pytest
import torch
import zero_runs
from worlds import run_world
from zero_engines import Setup

BF16 = torch.bfloat16
SHAPES = {
    "first.weight": (3, 5),
    "first.bias": (3,),
    "second.weight": (1, 3),
    "second.bias": (1,),
    "frozen.weight": (5, 1),
    "frozen.bias": (5,),
    "again.bias": (3,),
}


@pytest.mark.parametrize(
    "setup", [Setup(3), Setup(3, BF16), Setup(3, BF16, offload=True)], ids=lambda setup: setup.label
)
def test_parts_are_cut_row_after_row_with_the_padding_at_the_end(setup):
    facts = run_world(zero_runs.layout, 2, setup, timeout=240)
    for rank, found in enumerate(facts):
        assert {name: one["shape"] for name, one in found.items()} == SHAPES
        for name, one in found.items():
            size = torch.Size(SHAPES[name]).numel()
            half = -(-size // 2)
            assert one["ranges"] == ((0, half), (half, size))
            assert (one["layout"], one["refusal"], one["type"], one["is the part"]) == ("flat", None, "Tensor", True)
            has_master = not name.startswith("frozen") and one["ranges"][rank][0] < one["ranges"][rank][1]
            assert one["master"] is (True if has_master else None), name


@pytest.mark.parametrize("setup", [Setup(3), Setup(3, BF16), Setup(3, prefetch=True)], ids=lambda setup: setup.label)
def test_a_part_written_after_settling_is_what_the_next_forward_uses(setup):
    for one in run_world(zero_runs.settling, 2, setup, timeout=240):
        # Without these the test would show nothing: gathered copies stay behind, or are on their way.
        assert one["on their way"] if setup.prefetch else len(one["gathered"]) == 21
        assert one["gathered after"] == []
        assert one["unused"] == []
        assert 3.0 < one["loss"] < 4.5
