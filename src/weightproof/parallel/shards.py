"""Sharded tensors as parts: what this process holds, and how the whole meets on its owner.

`placements` says where a tensor lives; a `Shard` is what the rest of the library works with. Screens
read the parts where they are. Where exactness demands the whole matrix, its parts travel to one
owner, never more at a time than the largest matrix holds, and nobody else allocates it.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from weightproof.collective import Message, Processes, deal
from weightproof.errors import CollectiveError, InputError
from weightproof.parallel.placements import (
    COLUMNS,
    FLAT,
    ROWS,
    Ranges,
    cut_of,
    local_of,
    part_shape,
    refusal_of,
    shape_of,
)

# Of a cut by columns, parts arrive in pieces of about this size, in at most so many turns.
_STAGED_BYTES = 1 << 22
_MOST_TURNS = 16

Item = TypeVar("Item")
R = TypeVar("R")


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


# What an item of dealt work consists of: whole here (or fetched so, on its owner alone), sharded, or not there.
Part = Tensor | Callable[[], Tensor | None] | Shard | None


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


# ---------------------------------------------------------------- whole on the owner, and back


def assemble(processes: Processes, operation: str, requests: Sequence[tuple[int, Shard]]) -> list[Tensor | None]:
    """Bring the parts of sharded tensors together, each on its owner; nobody else allocates it.

    Parts are received straight into the result, those of a cut by columns some rows at a time, to be
    put in place; an owner that holds everything gets its own part. Every rank calls this with the
    same requests, inside `processes.together` where it can fail on one.

    Args:
        processes: All of them take part.
        operation: For error messages.
        requests: (owner, this rank's shard) of each tensor.

    Returns:
        On its owner the whole tensor, row after row as it is stored, seen as (d_out, d_in) where it is turned;
        None elsewhere. Do not write to it.
    """
    wholes = [_room_for(shard, owner) if owner == processes.rank else None for owner, shard in requests]

    def moves(number: int, rows: slice) -> Iterator[_Move]:
        (owner, shard), whole = requests[number], wholes[number]
        for holder in _holders(shard):
            source = shard.local[rows] if holder == processes.rank else None
            yield _Move(holder, owner, source, None if whole is None else _slot(whole, shard, holder, rows))

    _carry(processes, operation, requests, moves)
    return [
        None if whole is None else _oriented(whole, shard) for (_, shard), whole in zip(requests, wholes, strict=True)
    ]


def distribute(processes: Processes, operation: str, items: Sequence[tuple[int, Shard, Tensor | None]]) -> list[Tensor]:
    """The way back from `assemble`: the owner's whole values, cast to the stored dtype, in parts.

    Args:
        processes: All of them take part.
        operation: For error messages.
        items: (owner, this rank's shard, the whole values on the owner, oriented as `assemble` gives them).

    Returns:
        This rank's part of each, of the shape of `shard.local`.

    Raises:
        InputError: On an owner whose values are missing or of another shape.
    """
    wholes = [_as_stored(whole, shard) if owner == processes.rank else None for owner, shard, whole in items]
    parts = [torch.empty(shard.local.shape, dtype=shard.dtype, device=shard.local.device) for _, shard, _ in items]

    def moves(number: int, rows: slice) -> Iterator[_Move]:
        (owner, shard, _), whole = items[number], wholes[number]
        for holder in _holders(shard):
            target = parts[number][rows] if holder == processes.rank else None
            yield _Move(owner, holder, None if whole is None else _slot(whole, shard, holder, rows), target)

    _carry(processes, operation, [(owner, shard) for owner, shard, _ in items], moves)
    return parts


@dataclass(frozen=True, eq=False)
class _Move:
    """From the `source`, on the sender, into the `target`, on the receiver; None elsewhere."""

    sender: int
    receiver: int
    source: Tensor | None
    target: Tensor | None


def _carry(
    processes: Processes,
    operation: str,
    requests: Sequence[tuple[int, Shard]],
    moves: Callable[[int, slice], Iterator[_Move]],
) -> None:
    """Make the moves of all tensors, some rows of each at a time; as many exchanges on every rank."""
    blocks = [_row_blocks(shard) if _travels(shard, owner) else [slice(None)] for owner, shard in requests]
    travels = any(_travels(shard, owner) for owner, shard in requests)
    name = _named(operation, [shard for _, shard in requests])
    spare: dict[tuple[int, int], Tensor] = {}
    for turn in range(max(map(len, blocks), default=0)):
        sends: list[Message] = []
        receives: list[Message] = []
        arrivals: list[tuple[Tensor, Tensor]] = []
        for number in [number for number, rows in enumerate(blocks) if turn < len(rows)]:
            for move in moves(number, blocks[number][turn]):
                if move.sender == move.receiver:
                    _copy_here(move)
                elif move.source is not None:
                    sends.append((move.receiver, _as_sent(move.source, requests[number][1])))
                elif move.target is not None:
                    arrivals.append((move.target, _landing(move.target, spare, (number, move.sender))))
                    receives.append((move.sender, arrivals[-1][1]))
        if travels:
            processes.exchange(name, sends, receives)
        for target, landing in arrivals:
            if landing is not target:
                target.copy_(landing)


def _travels(shard: Shard, owner: int) -> bool:
    """Whether anybody but its owner holds elements of a tensor."""
    return _holders(shard) not in ([], [owner])


def _row_blocks(shard: Shard) -> list[slice]:
    """What travels at a time: all of it, or of a cut by columns some rows: they are put in place afterwards."""
    if shard.layout != COLUMNS:
        return [slice(None)]
    row_bytes = torch.Size(shard.shape[1:]).numel() * shard.dtype.itemsize
    step = max(1, _STAGED_BYTES // row_bytes, -(-shard.shape[0] // _MOST_TURNS))
    return [slice(start, min(start + step, shard.shape[0])) for start in range(0, shard.shape[0], step)]


def _copy_here(move: _Move) -> None:
    """An owner's own part, unless both are the same memory."""
    if move.source is not None and move.target is not None and move.source.data_ptr() != move.target.data_ptr():
        move.target.copy_(move.source)


def _as_sent(source: Tensor, shard: Shard) -> Tensor:
    return source.to(device=shard.local.device, dtype=shard.dtype).contiguous()


def _landing(target: Tensor, spare: dict[tuple[int, int], Tensor], key: tuple[int, int]) -> Tensor:
    """Where to receive: in the target itself, or, where it is not one piece of memory, in what is kept for it."""
    if target.is_contiguous():
        return target
    if key not in spare:  # the first rows are not fewer than those that come later
        spare[key] = torch.empty(target.shape, dtype=target.dtype, device=target.device)
    return spare[key][: target.shape[0]]


def _room_for(shard: Shard, owner: int) -> Tensor:
    """Memory for a whole tensor on its owner; what it holds, where that is everything."""
    if not _travels(shard, owner):
        return shard.local.reshape(shard.shape)
    return torch.empty(shard.shape, dtype=shard.dtype, device=shard.local.device)


def _holders(shard: Shard) -> list[int]:
    """Ranks that hold elements."""
    return [rank for rank, (start, end) in enumerate(shard.ranges) if end > start and 0 not in shard.shape]


def _slot(whole: Tensor, shard: Shard, rank: int, rows: slice) -> Tensor:
    """Where a rank's part, or some rows of a part cut by columns, lies in the whole."""
    part = slice(*shard.ranges[rank])
    if shard.layout == COLUMNS:
        return whole[rows, part]
    return whole.reshape(-1)[part] if shard.layout == FLAT else whole[part]


def _oriented(stored: Tensor, shard: Shard) -> Tensor:
    return stored.T if shard.turned else stored


def _as_stored(whole: Tensor | None, shard: Shard) -> Tensor:
    wanted = shard.shape[::-1] if shard.turned else shard.shape
    if whole is None or tuple(whole.shape) != wanted:
        found = "nothing" if whole is None else f"shape {list(whole.shape)}"
        raise InputError(f"the owner of a tensor of shape {list(wanted)} has {found} to give back")
    return _oriented(whole.detach(), shard)


def _named(operation: str, shards: Sequence[Shard]) -> str:
    """An operation with its size: ranks whose tensors differ in shape or dtype do not meet, and see why."""
    total = sum(torch.Size(shard.shape).numel() * shard.dtype.itemsize for shard in shards)
    return f"{operation} ({len(shards)} sharded tensors of {total} bytes)"


# ---------------------------------------------------------------- dealt work


def dealt(  # noqa: PLR0913 - what is done, of what parts, at what cost
    processes: Processes,
    items: Sequence[Item],
    *,
    cost: Callable[[Item], float],
    parts: Sequence[Callable[[Item], Part]],
    work: Callable[..., R],
    operation: str,
) -> list[R]:
    """Do the work on each item on one rank, its owner, and give every rank all results.

    Owners are chosen by cost. Sharded parts meet on the owner, together never more than the largest item of all
    (see `rounds`); where everything is whole on every rank nothing travels but the results. What `work` raises on one
    rank ends it on all. Every rank calls this with the same items.

    Args:
        processes: All of them take part.
        items: What there is to do.
        cost: Estimate for one item, in any unit.
        parts: For each further argument of `work`, a function of the item: the tensor where it is
            whole here, a function that fetches it (called on the owner alone), a shard, or None.
        work: Called on the owner with the item and its parts, whole. Results must be picklable.
        operation: For error messages.

    Returns:
        The results, in the order of the items.

    Raises:
        CollectiveError: If the ranks were given different items, or another rank failed.
    """
    costs = [float(cost(item)) for item in items]
    _require_alike(processes, operation, costs)
    owners = deal(costs, processes.size)
    done: dict[int, R] = {}
    with processes.together(operation):
        wanted = {index: [part(item) for part in parts] for index, item in enumerate(items)}
        travels = [sum(_bytes_of(part) for part in wanted[index]) for index in range(len(items))]
        for indices in rounds(owners, costs, processes.size, travels):
            mine = _brought_together(processes, operation, {index: wanted.pop(index) for index in indices}, owners)
            for index in list(mine):
                # Parts are let go of before the next come, and fetched no sooner than they are worked on.
                done[index] = work(items[index], *(part() if callable(part) else part for part in mine.pop(index)))
    results = {index: result for ranks in processes.gather(operation, done) for index, result in ranks.items()}
    return [results[index] for index in range(len(items))]


def rounds(
    owners: Sequence[int], costs: Sequence[float], size: int, travels: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Indices of the items that are worked on between two exchanges, each owner's costliest first.

    An owner of cheap items gets several while another works on one that is dear, so that neither waits for the other;
    what has travelled to it lies there together, and is never more than the largest item of all.

    Args:
        owners: Of each item.
        costs: Of each item.
        size: How many owners there are.
        travels: Bytes of each item that meet on its owner; None: one item of each owner at a time.
    """
    queues: list[deque[int]] = [deque() for _ in range(size)]
    for index in sorted(range(len(owners)), key=lambda index: -costs[index]):
        queues[owners[index]].append(index)
    most = max(travels, default=0) if travels is not None else 0
    while any(queues):
        longest = max(costs[queue[0]] for queue in queues if queue)
        turn: list[int] = []
        for queue in filter(None, queues):
            cost, held = 0.0, 0
            while queue and (not cost or cost + costs[queue[0]] <= longest):
                if cost and (travels is None or held + travels[queue[0]] > most):
                    break
                held += 0 if travels is None else travels[queue[0]]
                cost += costs[queue[0]] or 1.0
                turn.append(queue.popleft())
        yield turn


def _bytes_of(part: Part) -> int:
    """What a part holds once it is whole on its owner, where it travels there."""
    return torch.Size(part.shape).numel() * part.dtype.itemsize if isinstance(part, Shard) else 0


def _brought_together(
    processes: Processes, operation: str, wanted: Mapping[int, list[Part]], owners: Sequence[int]
) -> dict[int, list[Tensor | Callable[[], Tensor | None] | None]]:
    """The parts of those items that this rank owns: shards whole, the others as they are."""
    sharded = [(owners[index], part) for index, found in wanted.items() for part in found if isinstance(part, Shard)]
    arrived = iter(assemble(processes, operation, sharded))
    mine: dict[int, list[Tensor | Callable[[], Tensor | None] | None]] = {}
    for index, found in wanted.items():
        wholes = [next(arrived) if isinstance(part, Shard) else part for part in found]
        if owners[index] == processes.rank:
            mine[index] = wholes
    return mine


def _require_alike(processes: Processes, operation: str, costs: Sequence[float]) -> None:
    """Refuse work of which the ranks have different ideas, before any of them waits for a part."""
    marks = processes.gather(operation, (len(costs), zlib.crc32(repr(costs).encode())))
    others = tuple(rank for rank, mark in enumerate(marks) if mark != marks[0])
    if others:
        raise CollectiveError(
            f"{operation}: the ranks have different work, {[count for count, _ in marks]} items by rank; "
            f"rank {others[0]} differs from rank 0 in number, order or sizes. Is the model the same on every rank?",
            operation=operation,
            ranks=others,
        )
