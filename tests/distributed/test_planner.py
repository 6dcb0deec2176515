"""Planning in two processes, whole and sharded: the plan of one process, on both, and nothing stays changed."""

import pytest
import torch
import trained_models
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from worlds import run_world

from weightproof import GuardSession, planner

BUDGET = 1.03


def _planned(rank, size, form):
    """Bits, predictions and rounds, and whether the weights were what they were after planning."""
    model = trained_models.load("llama").model
    if form == "sharded":
        mesh = init_device_mesh("cpu", (size,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    windows = trained_models.calibration_windows("llama", 5)
    session = GuardSession(model, policy=planner.budget_policy("balanced", BUDGET, has_loss=True), retain=windows)
    before = session.model_digest
    found = planner.plan(session, BUDGET, (2, 4, 8), granularity="group", group_size=32, include=("*.o_proj.weight",))
    with session.edit("nothing", on_violation="monitor") as step:
        pass
    assert step.record is not None
    carried = planner.carry_out(session, found.choose([0] * len(found.choices)))
    nats = [option.nats for choice in found.choices for option in choice.options]
    rounds = [(one.action, one.bits) for one in carried.rounds]
    session.close()
    return found.bits, nats, rounds, step.record.changed_names, before, session.model_digest


@pytest.mark.parametrize("form", ["whole", "sharded"])
def test_two_processes_plan_and_carry_out_what_one_does(form):
    (alone,) = run_world(_planned, 1, "whole")
    first, second = run_world(_planned, 2, form, timeout=120)
    assert first == second
    for bits, nats, rounds, changed, before, after in (alone, first):
        assert changed == ()
        assert before != after
        assert (bits, rounds) == (alone[0], alone[2])
        assert nats == pytest.approx(alone[1], rel=1e-3, abs=1e-9)
    assert torch.tensor(alone[1]).gt(0).any()
