"""Steering by two processes: the weights of one, trials that leave no trace on either, and one search."""

from __future__ import annotations

import copy

import pytest
import torch
import trained_models
from sharding import shard as shard_blocks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from worlds import run_world

from weightproof import Delta, GuardSession, InputError, edits, steer
from weightproof.alpha.fitting import moved
from weightproof.deltas import LowRank
from weightproof.families import unwrap
from weightproof.parallel.shards import assemble
from weightproof.steering import safe_alpha, search_alpha
from weightproof.weights import iter_weight_matrices


def a_delta(model: nn.Module) -> Delta:
    """Factors for a few matrices of a Llama, one dense."""
    generator = torch.Generator().manual_seed(0)
    parts = {}
    for one in iter_weight_matrices(model):
        if one.name.endswith(("down_proj.weight", "o_proj.weight")):
            left = torch.randn(one.d_out, 2, generator=generator) / one.d_out
            parts[one.name] = LowRank(left, torch.randn(2, one.d_in, generator=generator) / one.d_in**0.5)
    last = next(reversed(parts))
    return Delta({**parts, last: parts[last].dense()})


def whole(model, processes, names):
    found = {}
    for one in iter_weight_matrices(unwrap(model)):
        if one.name not in names:
            continue
        if one.shard is None:
            found[one.name] = one.load().detach().clone()
            continue
        wholes = [assemble(processes, one.name, [(owner, one.shard)])[0] for owner in range(processes.size)]
        found[one.name] = wholes[processes.rank].clone()
    return found


def guarded(rank, size, stored):
    base = trained_models.load("llama").model
    delta = a_delta(base)
    wanted = {
        one.name: moved(one.load(), delta.parts[one.name], 0.01).to(one.dtype)
        for one in iter_weight_matrices(base)
        if one.name in delta.parts
    }
    model = copy.deepcopy(base)
    model = DistributedDataParallel(model) if stored == "ddp" else shard_blocks(model)
    session = GuardSession(model, timeout=60)
    before, was = whole(model, session.processes, wanted), session.model_digest
    found = search_alpha(session, delta, [500.0, 0.01])
    again = whole(model, session.processes, wanted)
    assert all(torch.equal(before[name], again[name]) for name in wanted)
    assert (session.history, session.model_digest) == ((), was)
    if stored == "fsdp":
        with pytest.raises(InputError, match="is sharded over processes"), steer(model, delta):
            pass
        table = safe_alpha(model, delta)
        assert table.bound is None
        assert any("sharded" in (row.reason or "") for row in table)
    step = session.apply(edits.steer(delta, 0.01))
    ours = whole(model, session.processes, wanted)
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
    session.close()
    tried = [(one.alpha, one.action, one.kl) for one in found.trials]
    return found.alpha, tried, step.decision.action, step.decision.digest


@pytest.mark.parametrize("stored", ["ddp", "fsdp"])
def test_two_processes_steer_and_search_as_one(stored):
    first, second = run_world(guarded, 2, stored)
    assert first == second
    alpha, tried, action, _ = first
    assert alpha == 0.01
    assert [(value, what) for value, what, _ in tried] == [(500.0, "ROLLBACK"), (0.01, "KEEP")]
    assert action == "KEEP"
