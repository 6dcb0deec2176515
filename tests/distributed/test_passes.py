"""A forward pass of a sharded model that fails on one process, wherever it fails, leaves the others in step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from worlds import run_world

from weightproof.forward.passes import in_step, share_inputs, skip_pass

WIDTH = 6


class Net(nn.Module):
    """Nested shards, a group of two modules, and layers of one shape so that a gather mistaken for another shows."""

    def __init__(self, style: str) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(3))
        self.scale = nn.Parameter(torch.rand(WIDTH))
        self.head = nn.Linear(WIDTH, WIDTH)
        self.style = style

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        order = [2, 0, 1] if self.style == "turned" else [0, 1, 2, 0] if self.style == "repeated" else [0, 1, 2]
        for index in order:
            x = torch.tanh(self.layers[index](x))
        return self.head(x * self.scale)


def _sharded(style: str) -> nn.Module:
    model = Net(style)
    if style == "grouped":
        fully_shard([model.embed, model.head])
    for layer in model.layers:
        if style == "nested":
            fully_shard(layer[1])
        fully_shard(layer)
    fully_shard(model, reshard_after_forward=style == "kept" or None)
    if style == "prefetched":
        model.set_modules_to_forward_prefetch([model.layers[0], model.layers[1]])
        model.layers[1].set_modules_to_forward_prefetch([model.layers[2]])
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model


class _FaultError(Exception):
    pass


def _pass(model: nn.Module, x: torch.Tensor, fault: int | None, *, at_the_end: bool) -> torch.Tensor | int | None:
    """A pass; with `fault`, the number of the module whose entry (or end) raises. The number of modules without."""
    seen = []

    def hook(*_: object) -> None:
        seen.append(1)
        if len(seen) - 1 == fault:
            raise _FaultError

    handles = [
        module.register_forward_hook(hook) if at_the_end else module.register_forward_pre_hook(hook)
        for module in model.modules()
        if not isinstance(module, nn.ModuleList)
    ]
    try:
        with torch.no_grad(), in_step(model):
            output = model(x)
        return len(seen) if fault == -1 else output
    except _FaultError:
        return None
    finally:
        for handle in handles:
            handle.remove()


def _every_fault(rank: int, size: int, style: str) -> Any:
    assert dist.get_world_size() == size == 2
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(rank))
    with torch.no_grad():
        expected = Net(style)(x)
    model = _sharded(style)
    count = _pass(model, x, -1, at_the_end=False)
    wrong = []
    for at_the_end in (False, True):
        for fault in range(count):
            outcome = _pass(model, x, fault if rank == 1 else None, at_the_end=at_the_end)
            sharded = all(isinstance(parameter, DTensor) for parameter in model.parameters())
            after = _pass(model, x, None, at_the_end=at_the_end)
            fine = outcome is None if rank == 1 else torch.equal(outcome, expected)
            if not (fine and sharded and torch.equal(after, expected)):
                wrong.append((at_the_end, fault, fine, sharded))
    return count, wrong


@pytest.mark.parametrize("style", ["plain", "nested", "grouped", "turned", "repeated", "prefetched", "kept"])
def test_a_fault_anywhere_in_a_pass_leaves_the_processes_in_step(style):
    for count, wrong in run_world(_every_fault, 2, style):
        assert count >= 10
        assert wrong == []


def _first_pass(rank: int, size: int) -> Any:
    x = torch.randn(3, WIDTH)
    model = _sharded("grouped")
    _pass(model, x, 4 if rank == 1 else None, at_the_end=False)
    with torch.no_grad():
        return torch.equal(_pass(model, x, None, at_the_end=False), Net("grouped")(x))


def test_the_first_pass_of_all_may_fail():
    assert run_world(_first_pass, 2) == [True, True]


def _trains_on(rank: int, size: int, fault: int | None) -> Any:
    """A step of training after a pass, failed on rank 1 or whole on both."""
    model = _sharded("plain")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.ones(3, WIDTH)
    _pass(model, x, fault if rank == 1 else None, at_the_end=False)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.full_tensor().tolist() for parameter in model.parameters()]


def test_training_goes_on_as_if_the_pass_had_not_failed():
    sound, failed = run_world(_trains_on, 2, None), run_world(_trains_on, 2, 5)
    assert failed[0] == failed[1] == sound[0] == sound[1]


def _skips(rank: int, size: int) -> Any:
    x, model = torch.ones(3, WIDTH), _sharded("plain")
    expected = _pass(model, x, None, at_the_end=False)
    if rank == 1:
        with torch.no_grad():
            skip_pass(model)
        skip_pass(nn.Linear(2, 2))
    else:
        _pass(model, x, None, at_the_end=False)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return torch.equal(_pass(model, x, None, at_the_end=False), expected)


def test_a_pass_can_be_skipped():
    assert run_world(_skips, 2) == [True, True]


def _placed(rank: int, size: int) -> Any:
    square, line = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")), init_device_mesh("cpu", (4,))
    cases = {"whole": nn.Linear(4, 4), "FSDP2": fully_shard(nn.Linear(4, 4), mesh=line)}
    cases["FSDP2 and copies"] = fully_shard(nn.Linear(4, 4), mesh=square)
    cases["half of the processes"] = fully_shard(nn.Linear(4, 4), mesh=square["b"])
    cases["divided"] = nn.Linear(4, 4, bias=False)
    cases["divided"].weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), line, [Shard(0)]))
    cases["copied"] = nn.Linear(4, 4, bias=False)
    cases["copied"].weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), line, [Replicate()]))
    return {name: share_inputs(module, size) for name, module in cases.items()}


def test_inputs_are_dealt_only_where_each_process_computes_for_itself():
    dealt = {"whole", "FSDP2"}
    for placed in run_world(_placed, 4):
        assert {name for name, shared in placed.items() if not shared} == dealt
        assert len(placed) == 6
