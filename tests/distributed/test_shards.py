"""Parts of sharded tensors meet on their owner and go back, bit for bit, and nobody else allocates the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from sharded_models import ToyModel, ids, partition, shard
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as Cut
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from worlds import run_world

from weightproof.collective import Processes
from weightproof.errors import CollectiveError, InputError
from weightproof.parallel import shards
from weightproof.parallel.placements import local_of, refusal_of, settle, shape_of
from weightproof.parallel.shards import assemble, dealt, distribute, flat_kernels, rounds, shard_of, slab, whole_here


def values(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def cut(whole, dim):
    tensor = distribute_tensor(whole, init_device_mesh("cpu", (dist.get_world_size(),)), [Cut(dim)])
    assert isinstance(tensor, DTensor)
    return tensor


def zero3(whole):
    return partition(nn.Parameter(whole.clone()), dist.get_rank(), dist.get_world_size())


def sharded_forms(world_size):
    """(the whole, this rank's shard of it) in every layout, dtype and way to be uneven."""
    wholes = [values(65, 6), values(3, 5), values(7), values(64, 8, dtype=torch.bfloat16), values(5, 4, 3)]
    for whole in wholes:
        yield whole, shard_of(cut(whole, 0))
        yield whole, shard_of(zero3(whole))
    for whole in (values(6, 65), values(5, 2), values(8, 64, dtype=torch.bfloat16), values(2, 5, 3)):
        yield whole, shard_of(cut(whole, 1))
    for tensor in (cut(values(4, 6, 3), 0), cut(values(4, 6, 3), 1), zero3(values(4, 6, 3))):
        for index in range(4):
            yield values(4, 6, 3)[index], slab(shard_of(tensor), index)
            yield values(4, 6, 3)[index].T, replace(slab(shard_of(tensor), index), turned=True)
    for tensor in (cut(values(6, 5, 3), 0), cut(values(6, 5, 3), 1), zero3(values(6, 5, 3))):
        yield values(6, 5, 3).flatten(1), flat_kernels(shard_of(tensor))
    yield values(9, 4).T, replace(shard_of(cut(values(9, 4), 0)), turned=True)
    yield values(0, 4), shard_of(cut(values(0, 4), 0))
    assert world_size == dist.get_world_size() > 1


def meet_and_part(rank, size, staged):
    processes = Processes.join(timeout=30)
    shards._STAGED_BYTES = staged
    forms = list(sharded_forms(size))
    for start in range(size):  # each rank owns each form once
        owners = [(start + index) % size for index in range(len(forms))]
        requests = [(owner, part) for owner, (_, part) in zip(owners, forms, strict=True)]
        wholes = assemble(processes, "meet", requests)
        for owner, (expected, _), whole in zip(owners, forms, wholes, strict=True):
            assert (whole is not None) == (owner == rank)
            assert whole is None or (whole.dtype == expected.dtype and torch.equal(whole, expected))
            # what is read from a matrix depends on its memory order in the last bits
            assert whole is None or whole.stride() == expected.stride() or whole.numel() < 2
        doubled = [None if whole is None else whole.double() for whole in wholes]
        back = distribute(processes, "part", [(*r, d) for r, d in zip(requests, doubled, strict=True)])
        for (_, part), returned in zip(requests, back, strict=True):
            assert returned.is_contiguous()
            assert returned.dtype == part.dtype
            assert torch.equal(returned, part.local)
    return len(forms)


@pytest.mark.parametrize("staged", [1 << 22, 64], ids=["at once", "in turns"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_parts_meet_on_any_owner_and_go_back_bit_for_bit(size, staged):
    assert run_world(meet_and_part, size, staged) == [43] * size


class NewMemory(TorchDispatchMode):
    """Bytes of all tensors made on the way that do not alias one of the inputs of their operation."""

    def __init__(self):
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        old = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and not made.is_meta and made.untyped_storage()._cdata not in old:
                self.total += made.untyped_storage().nbytes()
                self.largest = max(self.largest, made.untyped_storage().nbytes())
        return result


def allocate_only_on_the_owner(rank, size):
    processes = Processes.join(timeout=30)
    shards._STAGED_BYTES = 4096
    found = {}
    whole = values(203, 100)
    forms = {"rows": shard_of(cut(whole, 0)), "columns": shard_of(cut(whole, 1)), "flat": shard_of(zero3(whole))}
    for layout, part in forms.items():
        assert part.layout == layout
        with NewMemory() as memory:
            (result,) = assemble(processes, layout, [(1, part)])
        assert result is None or torch.equal(result, whole)
        found[layout] = memory.total
    stack = cut(values(size, 50, 40), 0)
    with NewMemory() as memory:
        assemble(processes, "expert", [(1, slab(shard_of(stack), 1))])
    found["an owner that holds it all"] = memory.total
    return found


def test_only_the_owner_allocates_the_whole_and_nothing_beside_it():
    size = 3
    results = run_world(allocate_only_on_the_owner, size)
    whole, slack = 203 * 100 * 4, 256  # a few bytes go to the meetings
    for rank, found in enumerate(results):
        for layout in ("rows", "columns", "flat"):
            total = found[layout]
            # columns do not lie together: of 16 turns of 13 rows each, one is held until it is put in place
            staged = 13 * 100 * 4 if layout == "columns" else 0
            assert total <= (staged + whole if rank == 1 else 0) + slack, (rank, layout)
            assert total >= (whole if rank == 1 else 0)
        assert found["an owner that holds it all"] <= slack


# ---------------------------------------------------------------- dealt work

SIZES = [5, 9, 3, 12, 7, 8, 2]


def spectra(processes, *, broken_on=None):
    names = list(range(len(SIZES)))
    rank, forms = processes.rank, [lambda whole: whole]
    if processes.size > 1:
        forms += [lambda whole: shard_of(cut(whole, 0)), lambda whole: shard_of(zero3(whole))]
    stored = [forms[index % len(forms)](values(size, 6)) for index, size in enumerate(SIZES)]

    def work(index, whole, fetched, absent):
        assert absent is None
        assert torch.equal(fetched, torch.full((2,), float(index)))
        if broken_on == rank and index == 3:  # the longest, so rank 0's
            raise ValueError("no convergence")
        return index, torch.linalg.svdvals(whole.double()), rank

    return dealt(
        processes,
        names,
        cost=lambda index: SIZES[index],
        parts=[lambda index: stored[index], lambda index: lambda: torch.full((2,), float(index)), lambda index: None],
        work=work,
        operation="spectra",
    )


def deal_spectra(rank, size):
    return spectra(Processes.join(timeout=30))


@pytest.mark.parametrize("size", [2, 3])
def test_dealt_results_are_those_of_one_process_on_every_rank(size):
    alone = spectra(Processes.alone())
    for results in run_world(deal_spectra, size):
        assert [index for index, _, _ in results] == list(range(len(SIZES)))
        assert {rank for _, _, rank in results} == set(range(size)), "every rank owns something"
        for (_, found, _), (_, expected, _) in zip(results, alone, strict=True):
            assert torch.equal(found, expected)


def test_a_round_is_as_long_as_its_dearest_item_and_holds_no_more_than_the_largest():
    costs = [16.0, 4.0, 4.0, 4.0, 4.0, 1.0, 1.0, 0.0]
    owners = [0, 1, 1, 1, 1, 0, 1, 0]
    free = list(rounds(owners, costs, 2, [0] * 8))
    assert free == [[0, 1, 2, 3, 4], [5, 7, 6]], "four cheap items beside a dear one"
    # 10 bytes is the largest item: of four 4-byte items no more than two lie on their owner together
    travels = [10, 4, 4, 4, 4, 1, 1, 0]
    held = list(rounds(owners, costs, 2, travels))
    assert held[0] == [0, 1, 2]
    for turn in held:
        for rank in (0, 1):
            assert sum(travels[index] for index in turn if owners[index] == rank) <= max(travels)
    assert sorted(index for turn in held for index in turn) == list(range(8))
    assert [len(turn) for turn in rounds(owners, costs, 2)] == [2, 2, 2, 1, 1], "without sizes, one of each owner"


def break_on_rank_0(rank, size):
    processes = Processes.join(timeout=30)
    try:
        spectra(processes, broken_on=0)
    except (ValueError, CollectiveError) as error:
        return type(error).__name__, str(error), processes.gather("still in step", rank)
    return None


def test_an_exception_in_one_ranks_work_ends_it_on_all():
    results = run_world(break_on_rank_0, 3)
    assert [kind for kind, _, _ in results] == ["ValueError", "CollectiveError", "CollectiveError"]
    assert all("no convergence" in message for _, message, _ in results)
    assert all("rank 0" in message for _, message, _ in results[1:])
    assert all(after == [0, 1, 2] for _, _, after in results)


def different_items(rank, size):
    processes = Processes.join(timeout=30)
    items = [1.0, 2.0] if rank == 0 else [1.0, 3.0]
    try:
        dealt(processes, items, cost=lambda item: item, parts=[], work=lambda item: item, operation="readings")
    except CollectiveError as error:
        return error.ranks, str(error)
    return None


def test_ranks_with_different_work_refuse_it_before_they_start():
    for ranks, message in run_world(different_items, 2):
        assert ranks == (1,)
        assert "readings" in message
        assert "rank 1 differs" in message


def different_dtypes(rank, size):
    processes = Processes.join(timeout=30)
    part = values(4, 4) if rank == 0 else values(4, 4, dtype=torch.bfloat16)
    tensor = DTensor.from_local(part, init_device_mesh("cpu", (size,)), [Cut(0)])
    try:
        assemble(processes, "spectra", [(0, shard_of(tensor))])
    except CollectiveError as error:
        return str(error)
    return None


def test_parts_that_do_not_belong_together_are_not_sent():
    for message in run_world(different_dtypes, 2):
        assert "128 bytes" in message
        assert "64 bytes" in message


# ---------------------------------------------------------------- placements


class Named(nn.Module):
    def __init__(self, tensor):
        super().__init__()
        self.weight = nn.Parameter(tensor)


def refusals(rank, size):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    flat = init_device_mesh("cpu", (4,))
    whole = values(8, 8)
    both = Named(distribute_tensor(whole, mesh["b"], [Cut(0)]))
    fully_shard(both, mesh=mesh["a"])
    hybrid = nn.Linear(8, 8)
    fully_shard(hybrid, mesh=mesh)
    first = FullyShardedDataParallel(nn.Linear(8, 8), use_orig_params=True, device_id=torch.device("cpu"))
    few = zero3(whole)
    few.ds_zero_partition_world_size = 2
    nvme, quantised, twice = zero3(whole), zero3(whole), zero3(whole)
    nvme.ds_tensor.status.name = "NOT_AVAILABLE"
    quantised.ds_tensor.ds_quant_scale = torch.ones(1)
    twice.ds_secondary_tensor = torch.ones(1)
    refused = {
        "interleaved": both.weight,
        "mesh of 2 dimensions": hybrid.weight,
        "partial sums": DTensor.from_local(whole, flat, [Partial()]),
        "dimension 2": distribute_tensor(values(4, 4, 4), flat, [Cut(2)]),
        "ranks [": distribute_tensor(whole, mesh["b"], [Cut(0)]),
        "order of ranks [3, 2, 1, 0]": distribute_tensor(whole, DeviceMesh("cpu", [3, 2, 1, 0]), [Cut(0)]),
        "torch.chunk": DTensor.from_local(values(1 + rank % 2 * 2, 8), flat, [Cut(0)], shape=(8, 8), stride=(8, 1)),
        "FSDP version 1": next(first.parameters()),
        "2 of 4 processes": few,
        "NVMe": nvme,
        "quantised": quantised,
        "hpZ": twice,
    }
    for words, tensor in refused.items():
        reason = refusal_of(tensor)
        assert reason is not None, words
        assert words in reason, (words, reason)
        assert ":" in reason, "says what to do"
        with pytest.raises(InputError, match="cannot be read"):
            shard_of(tensor)
    return len(refused)


def test_other_placements_are_refused_by_name():
    assert run_world(refusals, 4) == [12] * 4


def whole_on_every_rank(rank, size):
    whole = values(5, 3)
    plain = nn.Parameter(whole.clone())
    same = distribute_tensor(whole, init_device_mesh("cpu", (size,)), [Replicate()])
    one_by_n = init_device_mesh("cpu", (1, size), mesh_dim_names=("a", "b"))
    for tensor in (plain, same, distribute_tensor(whole, one_by_n, [Cut(1), Replicate()])):
        assert shard_of(tensor) is None
        assert type(whole_here(tensor)) is torch.Tensor
        assert torch.equal(whole_here(tensor), whole)
    sharded = distribute_tensor(whole, one_by_n, [Replicate(), Cut(0)])
    assert shard_of(sharded).ranges == shard_of(cut(whole, 0)).ranges
    with pytest.raises(InputError, match="no process holds all of it"):
        whole_here(sharded)
    return shard_of(sharded).ranges


def test_whole_tensors_and_meshes_of_one_dimension_in_disguise():
    assert run_world(whole_on_every_rank, 2) == [((0, 3), (3, 5))] * 2


# ---------------------------------------------------------------- FSDP2


def kinds(model):
    return {type(parameter) for parameter in model.parameters()}


def settle_after_forward_passes(rank, size):
    model = shard(ToyModel())
    settle(model)
    assert kinds(model) == {DTensor}
    before = {name: (id(p), local_of(p).data_ptr()) for name, p in model.named_parameters()}
    with torch.no_grad():
        expected = model(ids())
    assert kinds(model) == {DTensor, nn.Parameter}, "the root stays whole: otherwise this test shows nothing"
    settle(model)
    assert kinds(model) == {DTensor}

    def fail(module, args):
        raise ZeroDivisionError

    handle = model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        model(ids())
    handle.remove()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    assert kinds(model) == {DTensor, nn.Parameter}, "reshard alone is not enough: otherwise this test shows nothing"
    settle(model)
    assert kinds(model) == {DTensor}
    assert {name: (id(p), local_of(p).data_ptr()) for name, p in model.named_parameters()} == before
    with torch.no_grad():
        assert torch.equal(model(ids()), expected)
    settle(model)
    return True


def test_settle_brings_back_the_same_shards():
    assert run_world(settle_after_forward_passes, 2) == [True, True]


def fsdp_parameters_assemble(rank, size):
    processes = Processes.join(timeout=30)
    plain = dict(ToyModel().named_parameters())
    model = shard(ToyModel())
    for index, (name, parameter) in enumerate(model.named_parameters()):
        assert isinstance(parameter, DTensor)
        assert shape_of(parameter) == tuple(plain[name].shape)
        (whole,) = assemble(processes, name, [(index % size, shard_of(parameter))])
        assert whole is None or torch.equal(whole, plain[name].detach())
    sides = shard(ToyModel(), shard_placement_fn=lambda p: Cut(1) if p.ndim == 2 and p.shape[1] % size == 0 else None)
    layouts = {name: shard_of(parameter).layout for name, parameter in sides.named_parameters()}
    assert set(layouts.values()) == {"rows", "columns"}
    for name, parameter in sides.named_parameters():
        (whole,) = assemble(processes, name, [(0, shard_of(parameter))])
        assert whole is None or torch.equal(whole, plain[name].detach())
    return sum(layout == "columns" for layout in layouts.values())


def test_fsdp2_parameters_assemble_to_the_unsharded_ones():
    assert run_world(fsdp_parameters_assemble, 2) == [3, 3]
