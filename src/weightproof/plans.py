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
from weightproof.shards import Shard, assemble, distribute, rounds
from weightproof.snapshot import write_matrix, write_part
from weightproof.tensor_store import tensor_digest
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
    sharded = [(matrix, matrix.shard) for matrix in matrices if matrix.shard is not None]
    costs = [screen_cost(matrix) for matrix, _ in sharded]
    owners = deal(costs, processes.size)
    for indices in rounds(owners, costs, processes.size):
        planned |= _rewrite_shards(processes, operation, [(owners[index], *sharded[index]) for index in indices], plan)
    return planned


def _rewrite_shards(
    processes: Processes, operation: str, owned: Sequence[tuple[int, WeightMatrix, Shard]], plan: Plan
) -> dict[str, str]:
    """One round of `rewrite`, at most one sharded matrix for each owner."""
    wholes = assemble(processes, operation, [(owner, shard) for owner, _, shard in owned])
    with processes.together(operation):
        new = [
            None if whole is None else _planned(matrix, whole, plan)
            for (_, matrix, _), whole in zip(owned, wholes, strict=True)
        ]
        del wholes  # what was planned is all that is needed of them
        ours = {
            m.name: tensor_digest(values) for (_, m, _), values in zip(owned, new, strict=True) if values is not None
        }
    planned: dict[str, str] = {}
    for theirs in processes.gather(operation, ours):
        planned |= theirs
    written = [
        (owner, matrix, shard, values)
        for (owner, matrix, shard), values in zip(owned, new, strict=True)
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
