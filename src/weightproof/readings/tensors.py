"""Exact facts about every parameter and buffer, over all processes of a run.

A tensor that every process holds whole is read by each from its own copy: replicas that drifted
apart are found, by rank and name. A sharded one is counted and hashed where its parts lie.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from weightproof.collective import Processes
from weightproof.digests import tensor_digests_of
from weightproof.errors import BaselineError, InputError
from weightproof.parallel.placements import is_dtensor, local_of, refusal_of, settle, shape_of
from weightproof.parallel.shards import shard_of
from weightproof.snapshot import Snapshot
from weightproof.snapshots.tensor_store import model_digest, tensor_digest
from weightproof.types import NamedTensor, StructureReading, TensorReading
from weightproof.weights import iter_tensors, read_structure


def count_nonfinite(tensor: torch.Tensor) -> int:
    """Number of NaN and inf elements; one read when there are none."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0:
        return 0
    if tensor.itemsize == 1:
        tensor = tensor.to(torch.bfloat16)  # holds every 8-bit float; those have no arithmetic of their own
    low, high = torch.aminmax(tensor) if not tensor.is_complex() else torch.aminmax(torch.view_as_real(tensor))
    if bool(torch.isfinite(low)) and bool(torch.isfinite(high)):
        return 0
    return int(tensor.numel() - torch.isfinite(tensor).sum())


def read_tensors(
    model: torch.nn.Module,
    known: Mapping[str, TensorReading],
    changed: Collection[str],
    processes: Processes | None = None,
) -> dict[str, TensorReading]:
    """Read every tensor that is in `changed` or not in `known`; reuse the readings of the rest.

    Args:
        model: The model; every process calls this for its own part of it.
        known: Readings to reuse, the same on every process.
        changed: Names that changed on any process.
        processes: Who takes part; None: this process alone.

    Raises:
        BaselineError: If a tensor has no values in memory (meta device), is not dense, or its values cannot be
            told apart from their storage (flattened by FSDP 1).
    """
    processes = processes or Processes.alone()
    settle(model)
    present = list(iter_tensors(model))
    stale = [named for named in present if named.name not in known or named.name in changed]
    found: dict[str, TensorReading] = {}
    cut: dict[str, NamedTensor] = {}
    with processes.together("reading the tensors"):
        for named in stale:
            _require_readable(named)
            if _is_cut(named.tensor):
                cut[named.name] = named
            else:
                found[named.name] = _whole(named)
    _require_alike(processes, cut)
    found |= _of_parts(cut, processes)
    fresh = {named.name: found[named.name] for named in stale}
    return _merged(fresh, known, sorted(known.keys() - {named.name for named in present}), processes)


def require_finite(tensors: Mapping[str, TensorReading], whose: str, remedy: str) -> None:
    """Refuse to compare anything with a model that is itself broken.

    Raises:
        BaselineError: Naming `whose` tensors hold NaN or inf, and the remedy.
    """
    broken = [one for one in tensors.values() if one.num_nonfinite and not one.is_infinite_by_design]
    if broken:
        shown = ", ".join(f"{one.name} ({one.num_nonfinite})" for one in broken[:3])
        raise BaselineError(
            f"{whose} itself holds NaN or inf in {len(broken)} tensors: {shown}. Nothing can be certified against a "
            f"broken model: {remedy}"
        )


def digest_of(tensors: Mapping[str, TensorReading]) -> str:
    """Digest of the model that these readings describe."""
    return model_digest({name: reading.digest for name, reading in tensors.items()})


def digests_at(snapshot: Snapshot, model: torch.nn.Module, processes: Processes) -> dict[str, str]:
    """Digest of every tensor in a snapshot just taken of `model`; of sharded ones, over the parts of all processes."""
    cut = {named.name: named.tensor for named in iter_tensors(model) if _is_cut(named.tensor)}
    return {**snapshot.digests, **tensor_digests_of(processes, cut)}


def _is_cut(tensor: torch.Tensor) -> bool:
    """Whether this process holds a part of a tensor, or holds it in a way that cannot be read as a whole."""
    return refusal_of(tensor) is not None or shard_of(tensor) is not None


def common_structure(model: torch.nn.Module, before: StructureReading | None, processes: Processes) -> StructureReading:
    """The structure of the model; where processes differ, the first that is not as `before`."""
    ours = read_structure(model)
    theirs = processes.gather("the model's structure", None if ours == before else ours)
    return next((structure for structure in theirs if structure is not None), ours)


def common_refusals(ours: Mapping[str, str], processes: Processes) -> dict[str, str]:
    """Why something cannot be read, by name: of any process, in the words of the lowest rank (they may name ranks)."""
    by_rank = processes.gather("what cannot be read", dict(ours))
    return {name: reason for theirs in reversed(by_rank) for name, reason in theirs.items()}


def _require_readable(named: NamedTensor) -> None:
    tensor = named.tensor.detach()
    refusal = refusal_of(named.tensor)
    if refusal is not None and not is_dtensor(named.tensor):
        raise BaselineError(f"{named.name} cannot be read: {refusal}")
    if tensor.is_meta or tensor.layout != torch.strided:
        raise BaselineError(
            f"{named.name} holds no dense values ({tensor.device}, {tensor.layout}): load the weights into memory, "
            "as dense tensors, before they are guarded"
        )


def _whole(named: NamedTensor) -> TensorReading:
    tensor = local_of(named.tensor).detach()
    num_nonfinite = count_nonfinite(tensor)
    return TensorReading(
        name=named.name,
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        storage=_storage(named),
        is_buffer=named.is_buffer,
        num_nonfinite=num_nonfinite,
        digest=tensor_digest(tensor),
        num_nan=int(torch.isnan(tensor).sum()) if num_nonfinite else 0,
        part_of=None if named.part_of is None else named.part_of[0],
    )


def _storage(named: NamedTensor) -> str:
    """Class of the tensor as one process would hold it (sharding is not a change of storage), or its backend."""
    if named.part_of is not None:
        return named.part_of[1]
    if local_of(named.tensor) is named.tensor:
        return type(named.tensor).__name__
    return "Tensor" if named.is_buffer else "Parameter"


def _require_alike(processes: Processes, cut: Mapping[str, NamedTensor]) -> None:
    """Refuse a model that is sharded on one rank and whole on another: its parts belong to nothing."""
    everywhere = processes.gather("names of sharded tensors", sorted(cut))
    for rank, names in enumerate(everywhere):
        odd = sorted(set(names) ^ set(everywhere[0]))
        if odd:
            raise InputError(
                f"{odd[0]} is sharded on one of the ranks 0 and {rank} and whole on the other: wrap and edit the model "
                "alike on every rank"
            )


def _of_parts(cut: Mapping[str, NamedTensor], processes: Processes) -> dict[str, TensorReading]:
    """Readings of sharded tensors, counted and hashed where their parts lie.

    Of parts that cannot be joined (`refusal_of`) it is known whether they are finite and whether they changed.
    """
    if not cut:
        return {}
    digests = tensor_digests_of(processes, {name: named.tensor for name, named in cut.items()})
    counts = _counted(cut, processes)
    return {
        name: TensorReading(
            name=name,
            dtype=str(local_of(named.tensor).dtype).removeprefix("torch."),
            shape=shape_of(named.tensor),
            storage=_storage(named),
            is_buffer=named.is_buffer,
            num_nonfinite=_of_whole(named.tensor, counts[name], 0),
            digest=digests[name],
            num_nan=_of_whole(named.tensor, counts[name], 1),
            nonfinite_ranks=_unless_all(num_nonfinite > 0 for num_nonfinite, _, _ in counts[name]),
        )
        for name, named in cut.items()
    }


# Of one part: how many elements are not finite, how many of these are NaN, how many there are.
_Counts = tuple[int, int, int]


def _counted(cut: Mapping[str, NamedTensor], processes: Processes) -> dict[str, list[_Counts]]:
    """The counts of the parts of each tensor, by rank."""
    ours: dict[str, _Counts] = {}
    for name, named in cut.items():
        local = local_of(named.tensor)
        num_nonfinite = count_nonfinite(local)
        ours[name] = num_nonfinite, int(torch.isnan(local).sum()) if num_nonfinite else 0, local.numel()
    by_rank = processes.gather("non-finite elements", ours)
    return {name: [theirs[name] for theirs in by_rank] for name in cut}


def _of_whole(tensor: torch.Tensor, counts: Sequence[_Counts], which: int) -> int:
    """A count of all parts, each element once: on a mesh of two dimensions, several processes may hold the same."""
    held, size = sum(num_elements for _, _, num_elements in counts), torch.Size(shape_of(tensor)).numel()
    return round(sum(count[which] for count in counts) * size / held) if held else 0


def _unless_all(flags: Iterable[bool]) -> tuple[int, ...]:
    """The ranks of which something is true, unless it is true of every one."""
    by_rank = list(flags)
    return () if all(by_rank) else tuple(rank for rank, flag in enumerate(by_rank) if flag)


def _merged(
    fresh: Mapping[str, TensorReading],
    known: Mapping[str, TensorReading],
    missing: Sequence[str],
    processes: Processes,
) -> dict[str, TensorReading]:
    """One reading of each tensor from those of all ranks; what nobody read anew stays as it was known.

    Known tensors come first, in their order, then those that are new: the same order on every rank.
    """
    by_rank = processes.gather("readings of the tensors", (dict(fresh), tuple(missing)))
    renewed = {name for read, gone in by_rank for name in (*read, *gone)}
    merged: dict[str, TensorReading] = {}
    for name in dict.fromkeys([*known, *(name for read, _ in by_rank for name in read)]):
        if name not in renewed:
            merged[name] = known[name]
            continue
        found = _common([None if name in gone else read.get(name, known.get(name)) for read, gone in by_rank])
        if found is not None:
            merged[name] = found
    return merged


def _common(readings: Sequence[TensorReading | None]) -> TensorReading | None:
    """The reading of the lowest rank that is not finite, else of the first; with the ranks that differ from rank 0."""
    there = [reading for reading in readings if reading is not None]
    if not there:
        return None
    chosen = next((reading for reading in there if reading.num_nonfinite), there[0])
    first = readings[0]
    differing = tuple(
        rank
        for rank, reading in enumerate(readings)
        if (reading is None) != (first is None)
        or (reading is not None and first is not None and _identity(reading) != _identity(first))
    )
    broken = _unless_all(reading is not None and reading.num_nonfinite > 0 for reading in readings)
    return replace(chosen, differing_ranks=differing, nonfinite_ranks=broken or chosen.nonfinite_ranks)


def _identity(reading: TensorReading) -> tuple[str, str, tuple[int, ...]]:
    return reading.digest, reading.dtype, reading.shape
