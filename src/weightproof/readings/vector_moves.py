"""How far biases and gains moved since a state was kept: no matrix, so nobody else reads them."""

from __future__ import annotations

import math

import torch
from torch import nn

from weightproof.parallel.placements import local_of, settle
from weightproof.snapshot import Snapshot
from weightproof.weights import iter_tensors

__all__ = ["vector_moves"]


def vector_moves(model: nn.Module, snapshot: Snapshot) -> dict[str, float]:
    """||v - v_before|| / ||v_before|| of every trained vector, by name; those that are zero or not finite are left out.

    Of a sharded vector it is that of the part that lies here. One synchronisation.

    Args:
        model: The model as it is now.
        snapshot: The state before.
    """
    settle(model)
    names: list[str] = []
    norms: list[torch.Tensor] = []
    for named in iter_tensors(model):
        if named.is_buffer or len(named.shape) != 1 or not named.tensor.requires_grad:
            continue
        now = local_of(named.tensor).detach()
        if now.numel() == 0 or not now.is_floating_point() or named.name not in snapshot.names:
            continue
        then = local_of(snapshot.original(named.name)).to(now.device)
        if then.shape == now.shape:
            names.append(named.name)
            both = torch.stack([now.double(), then.double()])
            norms.append(torch.stack([torch.dist(both[0], both[1]), both[1].norm()]))
    if not names:
        return {}
    found = torch.stack([norm.to(norms[0].device) for norm in norms]).tolist()
    moves = {name: moved / norm for name, (moved, norm) in zip(names, found, strict=True) if norm > 0.0}
    return {name: move for name, move in moves.items() if math.isfinite(move)}
