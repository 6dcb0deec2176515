"""Runs of two processes that suffer a fault and go back equal their twins, bit for bit on every process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from tests.support.sharding import shard
from tests.support.transactions import dropout_llama, require_batches, require_twins
from tests.support.twin_loops import loop, trained
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig
from worlds import run_world

from weightproof.errors import RestoreError
from weightproof_callbacks.training_state import TrainingState


def same_twins(data, run, **settings):
    ours, twin = run(data, **settings), run(None, skipped=data == "skip", **settings)
    require_twins(ours, twin)
    require_batches(data, ours, twin)
    return ours


def replicated(rank, size, folder):
    found = []
    for data, kind in (("replay", {"foreach": True}), ("skip", {"fused": True, "dtype": torch.bfloat16})):
        found.append(same_twins(data, loop, processes=size, **kind))
        order = {"train_sampling_strategy": "sequential", "optim": "adamw_torch_fused"}
        found.append(same_twins(data, trained, folder=folder, processes=size, **order))
    ours, twin = (trained(data, folder, processes=size, rows=80) for data in ("replay", None))
    require_twins(ours, twin)
    require_batches("replay", ours, twin)
    return [(one.weights, one.seen) for one in [*found, ours]]


def test_replicated_runs_of_two_processes(tmp_path):
    first, second = run_world(replicated, 2, tmp_path)
    assert len(first) == 5
    for (weights, seen), (others, theirs) in zip(first, second, strict=True):
        assert all(torch.equal(weights[name], others[name]) for name in weights), "the replicas are one model"
        assert not set(seen) & set(theirs), "each process has batches of its own"


class Sharded:
    """A run on a model of which each process holds a part."""

    def __init__(self, folder):
        self.folder = folder

    def loop(self, data, **settings):
        model = shard(dropout_llama(settings.pop("dtype", torch.float32)))
        return loop(data, model=model, **settings)

    def trained(self, data, **settings):
        model = LlamaForCausalLM.from_pretrained(
            self.folder / "model", distributed_config=DistributedConfig(fsdp_size=2)
        )
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        return trained(data, self.folder, model=model, **settings)


def sharded(rank, size, folder):
    assert dist.get_world_size() == size
    runs, found = Sharded(folder), []
    for data, kind in (("replay", {"fused": True}), ("skip", {"foreach": True, "dtype": torch.bfloat16})):
        found.append(same_twins(data, runs.loop, processes=size, **kind))
        order = {"train_sampling_strategy": "sequential", "processes": size}
        found.append(same_twins(data, runs.trained, **order))
    return [one.state for one in found]


def test_sharded_runs_of_two_processes(tmp_path):
    dropout_llama().save_pretrained(tmp_path / "model")
    first, second = run_world(sharded, 2, tmp_path)
    assert len(first) == len(second) == 4
    assert not set(first) & set(second), "each process keeps its own part"


def kept_parts(rank, size):
    """The state of a sharded run through clearing, through files, and with a copy altered on one process."""
    model = shard(dropout_llama())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = TrainingState.capture(optimizer=optimizer)
    digest = state.digest

    optimizer.state.clear()
    state.restore()
    assert TrainingState.capture(optimizer=optimizer).digest == digest, "made anew, cut as it was"
    fresh = torch.optim.AdamW(model.parameters(), lr=1e-2)
    TrainingState.from_parts(state.tensors(), state.values(), optimizer=fresh).restore()
    assert TrainingState.capture(optimizer=fresh).digest == digest
    assert all(isinstance(held["exp_avg"], DTensor) for held in fresh.state.values())
    fresh.step()
    optimizer.step()
    after = TrainingState.capture(optimizer=optimizer).digest
    assert TrainingState.capture(optimizer=fresh).digest == after

    if rank == 1:
        next(one for name, one in state.tensors().items() if name.endswith("exp_avg._local_tensor")).view(-1)[0] += 1
    words = ""
    try:
        state.restore()
    except RestoreError as error:
        words = str(error)
    return words, TrainingState.capture(optimizer=optimizer).digest == (after if rank == 1 else digest)


def test_the_state_of_shards_is_made_anew_read_from_files_and_refused_where_it_was_altered():
    (none, restored), (words, untouched) = run_world(kept_parts, 2)
    assert none == ""
    assert restored
    assert untouched
    assert "exp_avg._local_tensor was altered: nothing was restored" in words
