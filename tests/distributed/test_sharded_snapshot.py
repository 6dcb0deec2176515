"""Each process takes its part of a change back, bit for bit, into the same objects, waiting for no other."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from sharded_models import ToyModel, ids, partition_all, shard
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Shard as Cut
from worlds import run_world

from weightproof.collective import Processes
from weightproof.errors import InputError, RestoreError, SnapshotError
from weightproof.parallel.placements import local_of, settle
from weightproof.parallel.shards import Shard, assemble
from weightproof.snapshot import Snapshot, write_matrix, write_part
from weightproof.weights import iter_tensors, iter_weight_matrices

# -- edits -----------------------------------------------------------------------------------------


def copy_into_a_part(model, optimizer):
    with torch.no_grad():
        local_of(model.layers[0].q_proj.weight).copy_(torch.full_like(local_of(model.layers[0].q_proj.weight), 3.0))


def scale_everything(model, optimizer):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1000)


def poison(model, optimizer):
    with torch.no_grad():
        local_of(model.embed.weight).fill_(float("nan"))


def train_a_step(model, optimizer):
    model(ids()).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def train_and_look(model, optimizer):
    train_a_step(model, optimizer)
    with torch.no_grad():
        model(ids())
    assert not isinstance(model.embed.weight, DTensor), "the root is whole: otherwise this edit shows nothing"


def replace_a_parameter(model, optimizer):
    old = model.layers[1].down_proj.weight
    model.layers[1].down_proj.weight = nn.Parameter(old.detach() * 2)


def replace_a_module(model, optimizer):
    model.layers[0].q_proj = nn.Linear(16, 16)


def untie(model, optimizer):
    model.lm_head.weight = nn.Parameter(model.embed.weight.detach() * 2)


def cast(model, optimizer):
    model.to(torch.bfloat16)


def freeze(model, optimizer):
    scale_everything(model, optimizer)
    model.requires_grad_(False)


def write_planned_parts(model, optimizer):
    for matrix in iter_weight_matrices(model):
        write_part(matrix, torch.ones_like(matrix.shard.local))


EDITS = [
    *(copy_into_a_part, scale_everything, poison, train_a_step, train_and_look, replace_a_parameter),
    *(replace_a_module, untie, cast, freeze, write_planned_parts),
]


def bits(tensor):
    return str(tensor.dtype), tuple(tensor.shape), bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8))


def portrait(model, addresses=True):
    """Everything that a restore must bring back on this process."""
    return [
        (path, name, id(p), type(p), p.requires_grad, local_of(p).data_ptr() if addresses else 0, bits(local_of(p)))
        for path, module in model.named_modules(remove_duplicate=False)
        for table in (module._parameters, module._buffers)
        for name, p in table.items()
        if p is not None
    ], [(path, id(module), type(module)) for path, module in model.named_modules(remove_duplicate=False)]


def output_of(model):
    with torch.no_grad():
        output = model(ids())
    settle(model)
    return bits(output)


def take_back(rank, size, folder, columns):
    placement = {"shard_placement_fn": lambda p: Cut(1) if p.ndim > 1 and p.shape[1] % size == 0 else None}
    model = shard(ToyModel(), **(placement if columns else {}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train_a_step(model, optimizer)
    for edit in EDITS:
        expected = output_of(model)
        # A cast gives FSDP new padded storage, of which an uneven part keeps a copy after the restore.
        before = portrait(model, addresses=edit is not cast)
        with torch.no_grad():
            model(ids())  # leaves the root whole: capture brings it back
        snapshot = Snapshot.capture(model, folder)
        assert snapshot.nbytes == sum(local_of(named.tensor).nbytes for named in iter_tensors(model))
        assert snapshot.changed_names() == ()
        edit(model, optimizer)
        assert snapshot.changed_names() != (), edit.__name__
        assert snapshot.restore() == snapshot.model_digest
        assert portrait(model, addresses=edit is not cast) == before, edit.__name__
        assert snapshot.changed_names() == (), edit.__name__
        assert output_of(model) == expected, edit.__name__
        snapshot.discard()
    now = portrait(model)
    train_a_step(model, optimizer)
    trained = portrait(model)
    assert [row[:6] for row in trained[0]] == [row[:6] for row in now[0]], "the same objects go on training"
    changed = [new[-1] != old[-1] for new, old in zip(trained[0], now[0], strict=True) if old[3] is DTensor]
    assert all(changed) or local_of(model.layers[0].experts.up_proj).numel() == 0
    return len(EDITS)


@pytest.mark.parametrize("columns", [False, True])
def test_any_edit_of_an_fsdp2_model_is_taken_back_and_training_goes_on(columns):
    assert run_world(take_back, 2, None, columns) == [11, 11]


def test_from_a_folder_that_ranks_share_and_with_empty_parts(tmp_path):
    assert run_world(take_back, 4, str(tmp_path), False) == [11] * 4
    assert list(tmp_path.iterdir()) == []


def folders(rank, size, folder):
    snapshot = Snapshot.capture(shard(ToyModel()), folder)
    name = snapshot._store.folder.name
    dist.barrier()
    snapshot.discard()
    return name


def test_each_rank_keeps_a_folder_of_its_own(tmp_path):
    names = run_world(folders, 2, str(tmp_path))
    assert [name.split("-")[:2] for name in names] == [["snapshot", "rank0"], ["snapshot", "rank1"]]


def alone_on_one_rank(rank, size):
    model = shard(ToyModel())
    if rank == 1:  # waits for nothing and takes part in nothing
        return True
    before = portrait(model)
    snapshot = Snapshot.capture(model)
    scale_everything(model, None)
    assert set(snapshot.changed_names()) >= {"embed.weight", "layers.0.q_proj.weight"}
    snapshot.restore()
    assert portrait(model) == before
    return True


def test_a_snapshot_needs_no_other_process():
    assert run_world(alone_on_one_rank, 2, timeout=30) == [True, True]


# -- what was kept ---------------------------------------------------------------------------------


def originals_meet(rank, size, name):
    processes = Processes.join(timeout=30)
    plain = {matrix.name: matrix.load().clone() for matrix in iter_weight_matrices(ToyModel())}
    model = shard(ToyModel()) if name == "fsdp" else partition_all(ToyModel(), rank, size)
    snapshot = Snapshot.capture(model)
    for matrix in iter_weight_matrices(model):
        write_part(matrix, torch.zeros_like(matrix.shard.local))
    for index, matrix in enumerate(iter_weight_matrices(model)):
        kept = snapshot.original_shard(matrix)
        assert isinstance(kept, Shard)
        assert (kept.shape, kept.layout, kept.turned) == (matrix.shard.shape, matrix.shard.layout, matrix.shard.turned)
        with pytest.raises(InputError, match="was sharded"):
            snapshot.original_matrix(matrix)
        then, now = assemble(processes, matrix.name, [(index % size, kept), (index % size, matrix.shard)])
        assert then is None or torch.equal(then, plain[matrix.name])
        assert now is None or not now.any()
        with pytest.raises(InputError, match="sharded"):
            write_matrix(matrix, torch.zeros(matrix.d_out, matrix.d_in))
        with pytest.raises(InputError, match="this process holds"):
            write_part(matrix, torch.zeros(1, 1, 1))
    snapshot.restore()
    for matrix in iter_weight_matrices(model):
        (whole,) = assemble(processes, matrix.name, [(0, matrix.shard)])
        assert whole is None or torch.equal(whole, plain[matrix.name])
    return len(plain)


@pytest.mark.parametrize("name", ["fsdp", "zero3"])
def test_originals_are_sharded_as_the_matrices_are(name):
    assert run_world(originals_meet, 2, name) == [14, 14]


def companions_go_back(rank, size, folder):
    model = shard(ToyModel())
    masters = {f"group {i}": local_of(p).double().clone() for i, p in enumerate(model.parameters())}
    kept = {name: (id(tensor), tensor.data_ptr(), bits(tensor)) for name, tensor in masters.items()}
    snapshot = Snapshot.capture(model, folder, companions=masters)
    assert snapshot.names == {named.name for named in iter_tensors(model)} == set(snapshot.digests)
    assert snapshot.nbytes == sum(t.nbytes for t in masters.values()) + sum(
        local_of(named.tensor).nbytes for named in iter_tensors(model)
    )
    for tensor in masters.values():
        tensor.add_(1)
    assert snapshot.changed_names() == (), "they are beside the model, not of it"
    snapshot.restore()
    assert {name: (id(tensor), tensor.data_ptr(), bits(tensor)) for name, tensor in masters.items()} == kept
    snapshot.discard()
    return True


@pytest.mark.parametrize("in_folder", [False, True])
def test_companions_are_kept_and_written_back_with_the_model(in_folder, tmp_path):
    assert run_world(companions_go_back, 2, str(tmp_path) if in_folder else None) == [True, True]


# -- ZeRO-3 ----------------------------------------------------------------------------------------


def gather(parameter):
    """As DeepSpeed leaves a small parameter after a forward pass: whole here, beside its partition."""

    def partition():
        parameter.data = torch.empty(0)
        parameter.ds_status = SimpleNamespace(name="NOT_AVAILABLE")

    parameter.data = torch.full(tuple(parameter.ds_shape), 5.0)
    parameter.ds_status = SimpleNamespace(name="AVAILABLE")
    parameter.partition = partition


def test_a_zero3_partition_is_taken_back_wherever_deepspeed_has_moved_it():
    model = partition_all(ToyModel(), 1, 2)
    before = {name: (id(p), bits(local_of(p))) for name, p in model.named_parameters()}
    padding = {name: p.ds_tensor[len(local_of(p)) :].clone() for name, p in model.named_parameters()}
    assert any(len(rest) for rest in padding.values()), "some partition is padded"
    gather(model.layers[0].norm.weight)
    snapshot = Snapshot.capture(model)
    assert model.layers[0].norm.weight.shape == (0,)
    for parameter in model.parameters():
        parameter.ds_tensor.data = parameter.ds_tensor.data.clone()  # into a flat buffer, say
        local_of(parameter).mul_(7)
    gather(model.layers[1].norm.weight)
    assert set(snapshot.changed_names()) == snapshot.names - {"scale"} - {
        named.name for named in iter_tensors(model) if not local_of(named.tensor).any()
    }
    snapshot.restore()
    assert {name: (id(p), bits(local_of(p))) for name, p in model.named_parameters()} == before
    assert all(p.shape == (0,) for p in model.parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.ds_tensor[len(local_of(parameter)) :], padding[name])


# -- what cannot be kept or proven -----------------------------------------------------------------


class Quantized(torch.Tensor):
    """Stands for the tensor subclasses of quantizers."""


def refused(rank, size):
    mesh = init_device_mesh("cpu", (size,))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    part = torch.randn(2, 4).as_subclass(Quantized)
    model[1].register_buffer("packed", DTensor.from_local(part, mesh, [Cut(0)], run_check=False))
    with pytest.raises(SnapshotError, match=r"1.packed: it is a DTensor"):
        Snapshot.capture(model)
    two_dimensional = nn.Module()
    two_dimensional.weight = nn.Parameter(
        distribute_tensor(torch.randn(4, 4), init_device_mesh("cpu", (2, size // 2)), [Cut(0), Cut(1)])
    )
    snapshot = Snapshot.capture(two_dimensional)  # not measured, but taken back all the same
    before = bits(local_of(two_dimensional.weight))
    local_of(two_dimensional.weight).zero_()
    assert snapshot.changed_names() == ("weight",)
    snapshot.restore()
    assert bits(local_of(two_dimensional.weight)) == before
    snapshot._store._kept["weight"].zero_()
    local_of(two_dimensional.weight).add_(1)
    with pytest.raises(RestoreError, match="kept copy of weight was altered"):
        snapshot.restore()
    return True


def test_parts_that_are_not_plain_are_refused_and_any_placement_is_restored():
    assert run_world(refused, 4) == [True] * 4
