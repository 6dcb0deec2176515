"""Moments of sharded parameters: every process bounds its own part by the norm of the whole gradient."""

from __future__ import annotations

import torch
from tests.support.chains import Chains, tiny_llama
from tests.support.sharding import shard
from torch.utils.data import default_collate
from worlds import run_world

from weightproof.parallel.placements import local_of
from weightproof.testing.tampering import flip_bit, pick_element
from weightproof_callbacks.gradient_watch import GradientWatch


def sharded(rank, size):
    model = tiny_llama()
    shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, amsgrad=True)
    watch = GradientWatch(optimizer, model=model)
    rows = Chains(64, seed=1)
    healthy = []
    for step in range(6):
        batch = default_collate([rows[8 * step + i] for i in range(rank, 8, size)])
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        healthy.append(watch.impossible_moments())
    if rank == 1:
        moment = local_of(optimizer.state[model.lm_head.weight]["exp_avg_sq"])
        flip_bit(moment, pick_element(moment, 0), 1)
    return healthy, watch.impossible_moments()


def test_only_the_process_that_holds_a_broken_part_names_it():
    (healthy, first), (others, second) = run_world(sharded, 2)
    assert healthy == others == [()] * 6
    assert first == ()
    (said,) = second
    assert said.startswith("exp_avg_sq of lm_head.weight holds ")
