"""Where a tensor lives: whole on this process, cut by FSDP version 2, or partitioned by ZeRO-3.

Three storages are read. A plain tensor (one process, DDP) is whole on every rank. A `DTensor` (FSDP
version 2) is cut along its first or second dimension by the rule of `torch.chunk`, so parts may be
uneven or empty. A parameter of DeepSpeed ZeRO-3 is cut, row after row, into flat partitions of equal
length; it is known by its attributes (`ds_tensor`, `ds_shape`), DeepSpeed is not imported.

Every other placement is refused by name (`refusal_of`), never guessed and never skipped.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

ROWS, COLUMNS, FLAT = "rows", "columns", "flat"
Ranges = tuple[tuple[int, int], ...]


class Cut(NamedTuple):
    """How a tensor is cut: along what (rows, columns or flat), the range of each rank, and this rank."""

    layout: str
    ranges: Ranges
    rank: int


def chunk_ranges(size: int, num_parts: int) -> Ranges:
    """The rule of `torch.chunk`: parts of ceil(size / num_parts), the last ones shorter or empty.

    Example:
        >>> chunk_ranges(65, 4), chunk_ranges(3, 4)
        (((0, 17), (17, 34), (34, 51), (51, 65)), ((0, 1), (1, 2), (2, 3), (3, 3)))
    """
    step = -(-size // num_parts)
    return tuple((min(rank * step, size), min((rank + 1) * step, size)) for rank in range(num_parts))


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; a model cannot hold one before something has imported them."""
    module = None if type(tensor) in (Tensor, nn.Parameter) else sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_zero3(tensor: Any) -> bool:
    """Whether a parameter is partitioned by DeepSpeed ZeRO-3."""
    return getattr(tensor, "ds_tensor", None) is not None and hasattr(tensor, "ds_shape")


def is_flattened(tensor: Any) -> bool:
    """Whether a parameter is a piece of FSDP version 1, without the shape that it had."""
    return getattr(tensor, "_fsdp_flattened", False) or getattr(tensor, "_is_flat_param", False)


def shape_of(tensor: Any) -> tuple[int, ...]:
    """Logical shape of a tensor: of the whole one where this process holds a part."""
    return tuple(tensor.ds_shape if is_zero3(tensor) else tensor.shape)


def local_of(tensor: Any) -> Tensor:
    """The plain tensor behind a parameter or buffer, on its live storage, without autograd.

    A plain tensor itself, the local part of a DTensor, this rank's partition of a ZeRO-3 parameter
    (1-D, without the padding at the end).
    """
    if is_zero3(tensor):
        start, end = _zero3_ranges(tensor)[_zero3_rank(tensor)]
        return tensor.ds_tensor.detach().view(-1)[: end - start]
    if is_dtensor(tensor):
        with torch.no_grad():
            return tensor.to_local().detach()
    return tensor.detach()


def cut_of(tensor: Any) -> Cut | None:
    """How a tensor of readable placement is cut; None where this process holds all of it."""
    if is_zero3(tensor):
        return Cut(FLAT, _zero3_ranges(tensor), _zero3_rank(tensor))
    dim = _cut_dim(tensor) if is_dtensor(tensor) else None
    if dim is None:
        return None
    return Cut((ROWS, COLUMNS)[dim], chunk_ranges(tensor.shape[dim], dist.get_world_size()), dist.get_rank())


def refusal_of(tensor: Any) -> str | None:
    """Why the placement of a tensor cannot be read: what it is, and what to do; None when it can be."""
    if is_flattened(tensor):
        return (
            "it is flattened by FSDP version 1, which keeps no shapes: "
            "shard with FSDP version 2 (fully_shard; fsdp_version: 2 in an accelerate config)"
        )
    if is_zero3(tensor):
        return _zero3_refusal(tensor)
    return _dtensor_refusal(tensor) if is_dtensor(tensor) else None


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before `fully_shard` put one of its own in front of it."""
    fsdp, kinds = sys.modules.get("torch.distributed.fsdp"), type(module).__mro__
    if fsdp is None or fsdp.FSDPModule not in kinds:
        return type(module)
    return kinds[kinds.index(fsdp.FSDPModule) + 1]


def settle(model: nn.Module) -> None:
    """Bring every parameter back to its sharded form, without communication.

    FSDP version 2 leaves the root's parameters whole after a forward pass without gradients, and a
    whole group after a forward pass that raised; ZeRO-3 keeps small parameters gathered. What was
    written into such a gathered copy, outside of `deepspeed.zero.GatheredParameters`, goes with it,
    as it would at DeepSpeed's own next gather. A model without shards is left alone.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    sharded = () if fsdp is None else fsdp.FSDPModule
    roots: list[Any] = [module for module in model.modules() if isinstance(module, sharded)]
    for module in roots:
        module.reshard()
    for module in roots:
        # `reshard` does nothing for a group whose forward pass was cut short; a state dict always shards.
        if not all(is_dtensor(parameter) for parameter in module.parameters()):
            module.state_dict()
    _settle_zero3(list(model.parameters()))


def _settle_zero3(parameters: list[Any]) -> None:
    partitioned = [parameter for parameter in parameters if is_zero3(parameter)]
    optimizers = [parameter._z3_optimizer for parameter in partitioned if hasattr(parameter, "_z3_optimizer")]
    # An edit may have put in parameters that DeepSpeed does not know, and which a restore takes out again.
    if optimizers and len(partitioned) == len(parameters):
        # DeepSpeed's own way also takes in what was gathered ahead for the next forward pass, which would
        # otherwise be used there with the values of before.
        optimizers[0].empty_partition_cache()
        return
    for parameter in partitioned:
        if parameter.ds_status.name == "AVAILABLE":
            parameter.partition()


# ---------------------------------------------------------------- DTensor


def _axes(tensor: Any) -> list[tuple[int, Any]]:
    """(number of processes, placement) of each mesh dimension that has more than one process."""
    return [axis for axis in zip(tensor.device_mesh.shape, tensor.placements, strict=True) if axis[0] > 1]


def _cut_dim(tensor: Any) -> int | None:
    """The dimension along which a readable DTensor is cut; None where every process holds it all."""
    return next((placement.dim for _, placement in _axes(tensor) if not placement.is_replicate()), None)


def _dtensor_refusal(tensor: Any) -> str | None:
    axes, ranks, world = _axes(tensor), tensor.device_mesh.mesh.flatten().tolist(), dist.get_world_size()
    kind = type(local_of(tensor))
    reason = None
    if kind is not Tensor:
        reason = f"its parts are stored as {kind.__name__}, not as plain tensors: dequantise it to measure it"
    elif sorted(ranks) != list(range(world)):
        reason = f"it lives on ranks {ranks} of {world} processes: shard it over all of them"
    elif any(placement.is_partial() for _, placement in axes):
        reason = "it holds partial sums: reduce it first (redistribute it to Replicate)"
    elif any(type(placement).__name__ == "_StridedShard" for _, placement in axes):
        reason = "its parts are interleaved, as tensor parallelism under FSDP does: use one of the two"
    elif not all(placement.is_replicate() for _, placement in axes):
        reason = _cut_refusal(tensor, len(axes), ranks)
    mesh = " x ".join(str(size) for size in tensor.device_mesh.shape)
    return None if reason is None else f"{reason} (a DTensor placed {tensor.placements} on {mesh} processes)"


def _cut_refusal(tensor: Any, num_axes: int, ranks: list[int]) -> str | None:
    """Why a cut over all processes cannot be read."""
    if num_axes > 1:
        return (
            f"it is placed on a mesh of {num_axes} dimensions (hybrid sharding, or with tensor parallelism): "
            "only a cut over all processes at once can be read"
        )
    dim = _cut_dim(tensor)
    if dim not in (0, 1):
        return f"it is cut along dimension {dim}: only a cut along the first two can be read"
    if ranks != sorted(ranks):
        return f"its parts are in the order of ranks {ranks}: use a mesh in rising order"
    start, end = chunk_ranges(tensor.shape[dim], len(ranks))[dist.get_rank()]
    local, wanted = local_of(tensor), part_shape(tuple(tensor.shape), dim, end - start)
    if torch.Size(wanted).numel() != local.numel() or (local.numel() and tuple(local.shape) != wanted):
        return f"this process holds {list(local.shape)} of it where torch.chunk would give {list(wanted)}: cut it so"
    return None


def part_shape(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    """The shape with another size along one dimension."""
    return (*shape[:dim], size, *shape[dim + 1 :])


# ---------------------------------------------------------------- DeepSpeed ZeRO-3


def _zero3_world(tensor: Any) -> int:
    known = getattr(tensor, "ds_zero_partition_world_size", None)
    return known if known is not None else dist.get_world_size(tensor.ds_process_group)


def _zero3_rank(tensor: Any) -> int:
    known = getattr(tensor, "ds_zero_partition_rank", None)
    return known if known is not None else dist.get_rank(tensor.ds_process_group)


def _zero3_ranges(tensor: Any) -> Ranges:
    return chunk_ranges(torch.Size(tensor.ds_shape).numel(), _zero3_world(tensor))


def _zero3_refusal(tensor: Any) -> str | None:
    part, world, rank = tensor.ds_tensor, _zero3_world(tensor), _zero3_rank(tensor)
    if getattr(getattr(part, "status", None), "name", "AVAILABLE") != "AVAILABLE":
        return "its partition is swapped out to NVMe (ZeRO-Infinity): keep parameters on the device or the CPU"
    if hasattr(part, "ds_quant_scale"):
        return "its partition is quantised (ZeRO++): switch zero_quantized_nontrainable_weights off"
    if getattr(tensor, "ds_secondary_tensor", None) is not None:
        return "it has a second partition (ZeRO++ hpZ) that a restore would miss: set zero_hpz_partition_size to 1"
    if dist.is_initialized() and (world, rank) != (dist.get_world_size(), dist.get_rank()):
        return (
            f"it is partitioned over {world} of {dist.get_world_size()} processes (MiCS or another parallelism): "
            "partition it over all of them"
        )
    wanted = -(-torch.Size(tensor.ds_shape).numel() // world)
    if part.numel() != wanted:
        return f"this process holds {part.numel()} of its elements where ZeRO-3 gives {wanted}: was it reshaped?"
    return None
