"""A sharded model has the matrices, names, families, ties and structure of the unsharded one."""

from __future__ import annotations

import pytest
import torch
from sharded_models import ToyModel, partition_all, shard
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Cut
from worlds import run_world

from weightproof.collective import Processes
from weightproof.errors import InputError
from weightproof.parallel.shards import assemble
from weightproof.weights import iter_tensors, iter_weight_matrices, read_structure, storage_identity


def fsdp(rank, size):
    model = ToyModel()
    for layer in model.layers:  # modules whose class decides how they are read get another class, too
        fully_shard(layer.c_fc)
        fully_shard(layer.experts)
    return shard(model)


def fsdp_columns(rank, size):
    return shard(ToyModel(), shard_placement_fn=lambda p: Cut(1) if p.ndim > 1 and p.shape[1] % size == 0 else None)


def zero3(rank, size):
    return partition_all(ToyModel(), rank, size)


SHARDED = {"fsdp": (fsdp, "rows"), "fsdp columns": (fsdp_columns, "columns"), "zero3": (zero3, "flat")}


def facts(matrix):
    return (
        (matrix.name, matrix.family, matrix.d_out, matrix.d_in, matrix.dtype),
        (matrix.tied_names, matrix.tensor_name, matrix.is_view, matrix.refusal),
    )


def compare_with_the_unsharded_model(rank, size, name):
    make, layout = SHARDED[name]
    processes = Processes.join(timeout=30)
    plain, model = ToyModel(), make(rank, size)
    assert all(isinstance(parameter, DTensor) or hasattr(parameter, "ds_tensor") for parameter in model.parameters())
    assert read_structure(model) == read_structure(plain)
    assert read_structure(model).ties == {("embed.weight", "lm_head.weight")}
    expected, found = list(iter_weight_matrices(plain)), list(iter_weight_matrices(model))
    assert [facts(matrix) for matrix in found] == [facts(matrix) for matrix in expected]
    assert [(t.name, t.shape, t.tied_names, t.persistent) for t in iter_tensors(model)] == [
        (t.name, tuple(t.tensor.shape), t.tied_names, t.persistent) for t in iter_tensors(plain)
    ]
    parameters = {id(parameter) for parameter in model.parameters()}
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert theirs.shard is None
        with pytest.raises(InputError, match=f"sharded over {size} processes"):
            ours.load()
        (whole,) = assemble(processes, ours.name, [(index % size, ours.shard)])
        assert whole is None or (whole.shape == theirs.load().shape and torch.equal(whole, theirs.load()))
    stored = {named.name: named.tensor for named in iter_tensors(model)}
    assert {id(tensor) for tensor in stored.values() if isinstance(tensor, nn.Parameter)} == parameters
    assert len({storage_identity(tensor) for tensor in stored.values()}) == len(stored)
    layouts = {matrix.shard.layout for matrix in found}
    assert layout in layouts
    assert layouts <= {layout, "rows"}
    return len(found)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", SHARDED)
def test_every_matrix_of_a_sharded_model_is_the_unsharded_one(name, size):
    assert run_world(compare_with_the_unsharded_model, size, name) == [14] * size


def what_cannot_be_read_is_counted(rank, size):
    model = FullyShardedDataParallel(ToyModel(), use_orig_params=True, device_id=torch.device("cpu"))
    refusals = {matrix.name: matrix.refusal for matrix in iter_weight_matrices(model)}
    assert all("FSDP version 1" in refusal for name, refusal in refusals.items() if name.endswith("q_proj.weight"))
    return len(refusals), sum(refusal is None for refusal in refusals.values())


def test_parameters_of_fsdp_version_1_are_counted_and_refused():
    assert run_world(what_cannot_be_read_is_counted, 2) == [(19, 0)] * 2
