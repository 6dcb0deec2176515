"""Carry out a plan: new values for weight matrices, written through the snapshot's writer.

A matrix that every process holds whole is planned and written by each of them, from equal values to
equal values. The parts of a sharded one travel to its owner, which plans it; the new parts travel back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from weightproof.collective import Processes, deal
from weightproof.probes import screen_cost
from weightproof.shards import Shard, assemble, distribute
from weightproof.snapshot import tensor_digest, write_matrix, write_part
from weightproof.types import WeightMatrix

Plan = Callable[[WeightMatrix], torch.Tensor | None]


def rewrite(processes: Processes, operation: str, matrices: Sequence[WeightMatrix], plan: Plan) -> dict[str, str]:
    """Write what `plan` makes of each matrix (None leaves it), and give the digests of what it planned.

    Args:
        processes: Who takes part.
        operation: Shown in errors, for example the edit's name.
        matrices: The same on every process.
        plan: From a matrix, whose `load()` gives all of it, to new (d_out, d_in) values. Pure.
    """
    planned: dict[str, str] = {}
    with processes.together(operation):
        for matrix in matrices:
            if matrix.shard is None:
                values = plan(matrix)
                if values is not None:
                    planned[matrix.name] = tensor_digest(values.to(matrix.dtype))
                    write_matrix(matrix, values)
    sharded = [matrix for matrix in matrices if matrix.shard is not None]
    owners = deal([screen_cost(matrix) for matrix in sharded], processes.size)
    for turn in _turns(sharded, owners, processes.size):
        planned |= _rewrite_shards(processes, operation, turn, plan)
    return planned


def _turns(
    matrices: Sequence[WeightMatrix], owners: Sequence[int], size: int
) -> list[list[tuple[int, WeightMatrix, Shard]]]:
    """At most one matrix for each owner at a time."""
    queues: list[list[tuple[int, WeightMatrix, Shard]]] = [[] for _ in range(size)]
    for owner, matrix in zip(owners, matrices, strict=True):
        if matrix.shard is not None:
            queues[owner].append((owner, matrix, matrix.shard))
    longest = max(map(len, queues), default=0)
    return [[queue[turn] for queue in queues if turn < len(queue)] for turn in range(longest)]


def _rewrite_shards(
    processes: Processes, operation: str, turn: Sequence[tuple[int, WeightMatrix, Shard]], plan: Plan
) -> dict[str, str]:
    wholes = assemble(processes, operation, [(owner, shard) for owner, _, shard in turn])
    new: list[torch.Tensor | None] = [None] * len(turn)
    ours: dict[str, str] = {}
    with processes.together(operation):
        for index, ((_, matrix, _), whole) in enumerate(zip(turn, wholes, strict=True)):
            if whole is not None:
                new[index] = _planned(matrix, whole, plan)
                values = new[index]
                if values is not None:
                    ours[matrix.name] = tensor_digest(values)
    planned: dict[str, str] = {}
    for theirs in processes.gather(operation, ours):
        planned |= theirs
    written = [
        (owner, matrix, shard, values)
        for (owner, matrix, shard), values in zip(turn, new, strict=True)
        if matrix.name in planned
    ]
    parts = distribute(processes, operation, [(owner, shard, values) for owner, _, shard, values in written])
    with processes.together(operation):
        for (_, matrix, _, _), part in zip(written, parts, strict=True):
            write_part(matrix, part)
    return planned


def _planned(matrix: WeightMatrix, whole: torch.Tensor, plan: Plan) -> torch.Tensor | None:
    values = plan(replace(matrix, shard=None, load=lambda: whole))
    return None if values is None else values.to(device=whole.device, dtype=matrix.dtype)
