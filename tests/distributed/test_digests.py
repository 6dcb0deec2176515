"""Every tensor has the digest of the unsharded one on every rank, and only row digests travel."""

from __future__ import annotations

import pytest
import torch
from sharded_models import ToyModel, partition, partition_all, shard
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Shard as Cut
from worlds import run_world

from weightproof.collective import Processes
from weightproof.digests import tensor_digests_of
from weightproof.errors import CollectiveError
from weightproof.snapshots.tensor_store import tensor_digests
from weightproof.weights import iter_tensors

SHARDED = {
    "fsdp": lambda rank, size: shard(ToyModel()),
    "fsdp in bf16": lambda rank, size: shard(ToyModel().to(torch.bfloat16)),
    "fsdp columns": lambda rank, size: shard(
        ToyModel(), shard_placement_fn=lambda p: Cut(1) if p.ndim > 1 and p.shape[1] % size == 0 else None
    ),
    "zero3": lambda rank, size: partition_all(ToyModel(), rank, size),
}


def tensors_of(model):
    return {named.name: named.tensor for named in iter_tensors(model)}


def model_digests(rank, size, name):
    model = SHARDED[name](rank, size)
    assert all(isinstance(parameter, DTensor) or hasattr(parameter, "ds_tensor") for parameter in model.parameters())
    return tensor_digests_of(Processes.join(timeout=30), tensors_of(model))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", SHARDED)
def test_digests_are_those_of_the_unsharded_model(name, size):
    plain = ToyModel().to(torch.bfloat16) if "bf16" in name else ToyModel()
    expected = tensor_digests(tensors_of(plain))
    for found in run_world(model_digests, size, name):
        assert found == expected
        assert list(found) == list(expected)


def large_tensors(rank, size):
    processes = Processes.join(timeout=30)
    mesh = init_device_mesh("cpu", (size,))
    whole = torch.randn(300, 100, generator=torch.Generator().manual_seed(0))
    rows = distribute_tensor(whole, mesh, [Cut(0)])
    assert isinstance(rows, DTensor)
    digests = tensor_digests_of(processes, {"rows": rows})
    sent_for_rows = processes.bytes_sent
    digests |= tensor_digests_of(
        processes,
        {
            "columns": distribute_tensor(whole, mesh, [Cut(1)]),
            "flat": partition(nn.Parameter(whole.clone()), rank, size),
        },
    )
    return digests, sent_for_rows


def test_large_tensors_have_the_same_digest_in_every_layout():
    whole = torch.randn(300, 100, generator=torch.Generator().manual_seed(0))
    (expected,) = tensor_digests({"whole": whole}).values()
    results = run_world(large_tensors, 2)
    for digests, _ in results:
        assert digests == dict.fromkeys(["rows", "columns", "flat"], expected)
    assert sorted(sent for _, sent in results) == [0, 150 * 32], "one rank sends the digests of its rows, 32 bytes each"


def differing(rank, size):
    processes = Processes.join(timeout=30)
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("a", "b"))
    two_dimensional = distribute_tensor(torch.arange(64.0).reshape(8, 8), mesh, [Cut(0), Cut(1)])
    before = tensor_digests_of(processes, {"plain": torch.ones(3), "refused": two_dimensional})
    if rank == 3:
        two_dimensional.to_local().zero_()
    after = tensor_digests_of(processes, {"plain": torch.full((3,), float(rank)), "refused": two_dimensional})
    return before, after


def test_copies_that_differ_differ_and_unreadable_placements_are_proven_by_their_parts():
    results = run_world(differing, 4)
    assert len({before["plain"] for before, _ in results}) == 1
    assert len({after["plain"] for _, after in results}) == 4
    assert len({before["refused"] for before, _ in results}) == 1
    assert len({after["refused"] for _, after in results}) == 1
    assert results[0][0]["refused"] != results[0][1]["refused"], "the change on rank 3 is seen on all"


def other_shapes(rank, size):
    mesh = init_device_mesh("cpu", (size,))
    tensor = DTensor.from_local(torch.ones(2 + rank, 3), mesh, [Cut(0)])
    with pytest.raises(CollectiveError, match=r"rank 1"):
        tensor_digests_of(Processes.join(timeout=30), {"weight": tensor})
    return True


def test_ranks_whose_tensors_differ_in_shape_do_not_meet():
    assert run_world(other_shapes, 2) == [True, True]
