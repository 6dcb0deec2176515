"""Masters of real ZeRO optimizers: what undoes a write, what keeps it, what takes it back."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import zero_runs
from worlds import run_world
from zero_engines import Setup
from zero_runs import WEIGHT

BF16 = torch.bfloat16
SETUPS = [
    Setup(1),
    Setup(2),
    Setup(3),
    Setup(1, BF16),
    Setup(1, BF16, accumulate="fp32"),
    Setup(2, BF16),
    Setup(3, BF16),
    Setup(3, sub_group_size=4000),
    Setup(2, offload=True),
    Setup(3, BF16, offload=True),
]
each_setup = pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.label)


@cache
def run(name, *args):
    return run_world(getattr(zero_runs, name), 2, *args, timeout=240)


def both(facts, key):
    """What the two processes name, together."""
    return {name for one in facts for name in one[key]}


@each_setup
def test_the_optimizer_is_the_one_meant(setup):
    expected = "DeepSpeedZeroOptimizer" + ("_Stage3" if setup.stage == 3 else "")
    if setup.accumulate:
        expected = "BF16_Optimizer"
    assert [one["optimizer"] for one in run("life_of_a_write", setup)] == [expected] * 2


@each_setup
def test_a_raw_write_is_undone_by_the_next_step(setup):
    facts = run("life_of_a_write", setup)
    assert [one["written"] for one in facts] == [0.0, 0.0]
    assert both(facts, "stale after a raw write") == {WEIGHT}
    assert all(one["raw write, one step later"] > 0.05 for one in facts)


@each_setup
def test_a_refreshed_write_survives_the_next_steps(setup):
    facts = run("life_of_a_write", setup)
    assert both(facts, "refreshed masters") == {WEIGHT}
    assert [one["refreshed write, one step later"] for one in facts] == [0.0, 0.0]
    assert all(0.0 < one["refreshed write, after learning"] < 2e-3 for one in facts)


@each_setup
def test_nothing_is_stale_but_after_a_raw_write(setup):
    for one in run("life_of_a_write", setup):
        assert one["stale"] == dict.fromkeys(
            ("at first", "after training", "after refresh", "after taking it back"), ()
        )


@each_setup
def test_weights_and_masters_taken_back_train_on_as_if_nothing_had_been(setup):
    for one in run("life_of_a_write", setup):
        assert one["unlike the twin"] == {"after training": [], "after the next step": [], "masters": []}


@pytest.mark.parametrize(
    "setup", [Setup(1), Setup(1, BF16, accumulate="fp32"), Setup(3, sub_group_size=4000)], ids=lambda setup: setup.label
)
def test_cleared_moments_begin_again(setup):
    for one in run("life_of_moments", setup):
        assert one["cleared"] == one["cleared later"] >= 2
        assert one["cleared again"] == 0
        assert one["unlike the fresh one"] == []


@pytest.mark.parametrize("setup", [Setup(2), Setup(3)], ids=lambda setup: setup.label)
def test_what_cannot_be_followed_is_refused_by_name(setup):
    for one in run("refusals", setup):
        assert "DeepSpeed trains 21 parameters, of which this model holds 0" in one["another model"]
        assert f"{WEIGHT} is another parameter object" in one["replaced"]
        assert "moved away (hp_params): call engine.reload_states() first" in one["moved"]
        assert "FP16_UnfusedOptimizer of DeepSpeed cannot be guarded" in one["without ZeRO"]
        assert "choose ZeRO stage 1, 2 or 3" in one["without ZeRO"]
        assert one["nothing refused"] == "nothing was refused"
        if setup.stage < 3:
            assert f"{WEIGHT} had shape [56, 32]" in one["reshaped"]
            assert "now has [57, 32]" in one["reshaped"]


def test_an_optimizer_that_steps_on_the_weights_has_no_masters():
    assert run("without_masters") == [True, True]


@pytest.mark.parametrize("setup", [Setup(2), Setup(3, BF16)], ids=lambda setup: setup.label)
def test_masters_are_found_through_accelerate(setup):
    facts = run("prepared_by_accelerate", setup)
    for one in facts:
        assert one["processes"] == 2
        assert set(one["names"]) == {"engine", "optimizer", "accelerator", "all"}
        assert len({tuple(names) for names in one["names"].values()}) == 1
        assert one["another pair"] is True
        assert one["steps"] == 1
        assert 0.0 < one["after"] < 2e-3
    assert {name for one in facts for name in one["names"]["all"]} >= {WEIGHT, "model.norm.weight", "lm_head.weight"}
    assert both(facts, "stale") == {WEIGHT}
