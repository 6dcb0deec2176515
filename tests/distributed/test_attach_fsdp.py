"""`weightproof.attach` on a model that accelerate shards by FSDP2: windows, edits, checkpoints, in two processes.

On the CPU accelerate silently makes DDP of FSDP, so its state is told that it is FSDP before `prepare`.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from tests.support.chains import Chains, tiny_llama
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from worlds import run_world

from weightproof import attach, edits
from weightproof.readings.tensors import digest_of, read_tensors


class ShardedLoop:
    """Model, optimizer and data as accelerate prepares them under FSDP2."""

    def __init__(self, size, state_dict_type):
        self.accelerator = Accelerator(cpu=True)
        state = self.accelerator.state
        PartialState._shared_state["distributed_type"] = state.__dict__["distributed_type"] = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False,
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"], state_dict_type=state_dict_type,
        )  # fmt: skip
        model = tiny_llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        data = DataLoader(Chains(512, seed=1), batch_size=16)
        self.model, self.optimizer, data = self.accelerator.prepare(model, optimizer, data)
        assert self.accelerator.is_fsdp2
        assert dist.get_world_size() == self.accelerator.num_processes == size
        assert all(isinstance(parameter, DTensor) for parameter in self.model.parameters())
        self._batches = iter(data)

    def run(self, steps, *, poison=False):
        self.model.train()
        for _ in range(steps):
            self.accelerator.backward(self.model(**next(self._batches)).loss)
            if poison:
                for parameter in self.model.parameters():
                    parameter.data.to_local().fill_(float("nan"))
            self.optimizer.step()
            self.optimizer.zero_grad()

    def step_with_bad_gradients(self, *, here):
        """One step with gradients that are NaN in the part of some processes."""
        self.accelerator.backward(self.model(**next(self._batches)).loss)
        if here:
            for parameter in self.model.parameters():
                parameter.grad.to_local().fill_(float("nan"))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def moments(self):
        states = (self.optimizer.state[parameter] for parameter in self.model.parameters())
        return torch.cat([state[name].to_local().flatten() for state in states for name in ("exp_avg", "exp_avg_sq")])

    def local(self):
        return {name: tensor.to_local().clone() for name, tensor in self.model.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def windows(guard):
    return [(step.step, step.name, step.applied) for step in guard.history]


def train_and_edit(rank, size):
    loop = ShardedLoop(size, "SHARDED_STATE_DICT")
    with attach(loop.accelerator, loop.model, loop.optimizer, every=2) as guard:
        loop.run(2)
        good, moments = loop.local(), loop.moments()
        loop.run(2, poison=rank == 1)
        assert same(loop.local(), good), "taken back on both ranks, each its own part"
        assert torch.equal(loop.moments(), moments)
        loop.run(2)
        assert not same(loop.local(), good)
        kept = guard.apply(edits.RTN(8))
        good = loop.local()
        with guard.edit("zero"), torch.no_grad():
            loop.model.lm_head.weight.zero_()
        assert same(loop.local(), good)
        loop.run(1)
    return windows(guard), kept.name


def test_a_sharded_loop_is_counted_judged_and_taken_back_alike():
    first, second = run_world(train_and_edit, 2)
    assert first == second
    seen, name = first
    assert seen == [
        (2, "train", "kept"), (4, "train", "restored"), (6, "train", "kept"), (6, name, "kept"),
        (6, "zero", "restored"), (7, "train", "kept"),
    ]  # fmt: skip


def left_out(rank, size):
    loop = ShardedLoop(size, "SHARDED_STATE_DICT")
    with attach(loop.accelerator, loop.model, loop.optimizer, every=4) as guard:
        loop.run(2)
        good, moments = loop.local(), loop.moments()
        loop.step_with_bad_gradients(here=rank == 1)
        assert same(loop.local(), good)
        assert torch.equal(loop.moments(), moments)
        loop.run(1)
        assert not same(loop.local(), good)
    return windows(guard)


def test_a_gradient_that_is_nan_in_the_part_of_one_process_is_stepped_with_on_none():
    assert run_world(left_out, 2) == [[(4, "train", "kept")]] * 2


def save_and_load(rank, size, folder, state_dict_type):
    loop = ShardedLoop(size, state_dict_type)
    with attach(loop.accelerator, loop.model, loop.optimizer, every=10) as guard:
        loop.run(3)
        loop.accelerator.save_state(f"{folder}/good")
        good = loop.local()
        loop.run(1, poison=rank == 0)
        loop.accelerator.save_state(f"{folder}/rejected")
        assert same(loop.local(), good)
        assert guard.step == 4, "filling the emptied optimizer for the checkpoint is no step"
        loop.run(2)
        assert not same(loop.local(), good)
        loop.accelerator.load_state(f"{folder}/rejected")
        assert same(loop.local(), good), "what was written is the restored state"
        assert guard.step == 4
        loop.run(1)
        loop.accelerator.load_state(f"{folder}/good")
        assert same(loop.local(), good)
        assert digest_of(read_tensors(loop.model, {}, (), guard.session.processes)) == guard.session.model_digest
        loop.run(1)
    return windows(guard)


@pytest.mark.parametrize("state_dict_type", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_sharded_checkpoints_hold_judged_weights_and_are_proven(state_dict_type, tmp_path):
    first, second = run_world(save_and_load, 2, tmp_path, state_dict_type)
    assert first == second == [(3, "train", "kept"), (4, "train", "restored"), (4, "train", "kept")]
