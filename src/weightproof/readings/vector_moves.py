"""How far biases and gains moved since a state was kept: no matrix, so nobody else reads them."""

from __future__ import annotations

import math

import torch
from torch import nn

from weightproof.collective import Processes
from weightproof.parallel.placements import local_of, settle
from weightproof.parallel.shards import shard_of
from weightproof.snapshot import Snapshot
from weightproof.weights import iter_tensors

__all__ = ["vector_moves"]


def vector_moves(model: nn.Module, snapshot: Snapshot, processes: Processes) -> dict[str, float]:
    """||v - v_before|| / ||v_before|| of every trained vector, by name; those that are zero or not finite are left out.

    Of a vector that is whole here it is this process's own; of a sharded one, that of the whole, summed over the
    parts: one exchange of two numbers a vector. One synchronisation of the device.

    Args:
        model: The model as it is now.
        snapshot: The state before.
        processes: All of them take part.
    """
    settle(model)
    own: dict[str, torch.Tensor] = {}
    sharded: set[str] = set()
    for named in iter_tensors(model):
        if named.is_buffer or len(named.shape) != 1 or not named.tensor.requires_grad:
            continue
        now = local_of(named.tensor).detach()
        if not now.is_floating_point() or named.name not in snapshot.names:
            continue
        then = local_of(snapshot.original(named.name)).to(now.device)
        if then.shape == now.shape:
            both = torch.stack([now.double(), then.double()])
            own[named.name] = torch.stack([(both[0] - both[1]).square().sum(), both[1].square().sum()])
            if shard_of(named.tensor) is not None:
                sharded.add(named.name)
    found = _listed(own)
    parts = {name: found[name] for name in found if name in sharded}
    if processes.size > 1 and any(processes.gather("whether vectors are sharded", bool(parts))):
        every = processes.gather("moves of sharded vectors", parts)
        for name in sorted(set().union(*every)):
            squares = [theirs[name] for theirs in every if name in theirs]
            found[name] = (math.fsum(moved for moved, _ in squares), math.fsum(size for _, size in squares))
    moves = {name: math.sqrt(moved / size) for name, (moved, size) in found.items() if size > 0.0 and moved >= 0.0}
    return {name: move for name, move in moves.items() if math.isfinite(move)}


def _listed(squares: dict[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    """Numbers of a device, fetched at once."""
    if not squares:
        return {}
    device = next(iter(squares.values())).device
    pairs = torch.stack([pair.to(device) for pair in squares.values()]).tolist()
    return {name: (moved, size) for name, (moved, size) in zip(squares, pairs, strict=True)}
