"""Sharded tensors as parts: what this process holds, and how the whole meets on its owner.

`placements` says where a tensor lives; a `Shard` is what the rest of the library works with. Screens
read the parts where they are. Where exactness demands the whole matrix, its parts travel to one
owner, one matrix at a time per owner, and nobody else allocates it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from weightproof.errors import InputError
from weightproof.placements import (
    COLUMNS,
    FLAT,
    ROWS,
    Ranges,
    cut_of,
    local_of,
    part_shape,
    refusal_of,
    settle,
    shape_of,
)

__all__ = ["Shard", "flat_kernels", "local_of", "refusal_of", "settle", "shard_of", "slab", "whole_here"]


@dataclass(frozen=True, eq=False)
class Shard:
    """The part of a stored tensor (or of one matrix of it) that this rank holds.

    Attributes:
        shape: The whole, as it is stored.
        dtype: Storage dtype.
        layout: "rows" (dimension 0 is cut), "columns" (dimension 1) or "flat" (the elements in
            row-major order are cut, within a row where it falls so).
        ranges: Half-open range of each rank, by rank, in rows, columns or elements; may be empty.
        local: This rank's part, a plain tensor on live storage: read it, do not write to it.
            "rows" and "columns" keep the other dimensions, "flat" is 1-D.
        turned: For a matrix: (d_out, d_in) is the transpose of `shape`.
        rank: The rank that this process is, an index into `ranges`.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    ranges: Ranges
    local: Tensor
    turned: bool = False
    rank: int = 0


def shard_of(tensor: Tensor) -> Shard | None:
    """This process's part of a sharded tensor; None where the process holds all of it.

    Raises:
        InputError: If its placement cannot be read (see `refusal_of`).
    """
    shape, reason = shape_of(tensor), refusal_of(tensor)
    if reason is not None:
        raise InputError(f"a tensor of shape {list(shape)} cannot be read: {reason}")
    cut = cut_of(tensor)
    if cut is None:
        return None
    local, (start, end) = local_of(tensor), cut.ranges[cut.rank]
    if cut.layout != FLAT and start == end:  # empty parts have had several shapes over the versions of torch
        local = local.new_empty(part_shape(shape, int(cut.layout == COLUMNS), 0))
    return Shard(shape, local.dtype, cut.layout, cut.ranges, local, rank=cut.rank)


def whole_here(tensor: Tensor) -> Tensor:
    """The plain tensor behind one of which this process holds everything.

    Raises:
        InputError: If it is sharded.
    """
    if shard_of(tensor) is not None:
        raise InputError(f"a tensor of shape {list(shape_of(tensor))} is sharded: no process holds all of it")
    return local_of(tensor)


# ---------------------------------------------------------------- parts of parts


def slab(shard: Shard, index: int) -> Shard:
    """One matrix of an expert stack (E, m, n), as a 2-D shard.

    Of a stack that is cut between experts one rank holds all of the matrix and the others nothing;
    a cut along dimension 1 becomes a cut of the matrix's rows; flat ranges are cut to its elements.
    """
    rows, cols = shard.shape[1:]
    own_start, own_end = shard.ranges[shard.rank]
    if shard.layout == COLUMNS:
        return replace(shard, shape=(rows, cols), layout=ROWS, local=shard.local[index])
    if shard.layout == FLAT:
        first, size = index * rows * cols, rows * cols
        low, high = max(own_start, first), min(own_end, first + size)
        local = shard.local[low - own_start : high - own_start] if low < high else shard.local[:0]
        return replace(shard, shape=(rows, cols), ranges=_within(shard.ranges, first, size, 1), local=local)
    here = own_start <= index < own_end
    local = shard.local[index - own_start] if here else shard.local.new_empty(0, cols)
    return replace(shard, shape=(rows, cols), ranges=_within(shard.ranges, index * rows, rows, rows), local=local)


def _within(ranges: Ranges, first: int, size: int, unit: int) -> Ranges:
    """Ranges, in multiples of `unit`, cut to the `size` elements from `first` on and counted from there."""
    return tuple(
        (min(max(start * unit - first, 0), size), min(max(end * unit - first, 0), size)) for start, end in ranges
    )


def flat_kernels(shard: Shard) -> Shard:
    """The shard of a convolution (out, in, *kernel) as one of the matrix (out, in * positions)."""
    if len(shard.shape) == 2:
        return shard
    positions = torch.Size(shard.shape[2:]).numel()
    shape = (shard.shape[0], shard.shape[1] * positions)
    if shard.layout == FLAT:
        return replace(shard, shape=shape)
    unit = positions if shard.layout == COLUMNS else 1
    ranges = tuple((start * unit, end * unit) for start, end in shard.ranges)
    return replace(shard, shape=shape, ranges=ranges, local=shard.local.flatten(1))
