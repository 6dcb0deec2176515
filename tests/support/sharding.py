"""Models sharded by FSDP2 in a test's processes, and changes that are the same however a model is stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from weightproof.families import blocks


def shard(model: nn.Module, root_options: Mapping[str, Any] | None = None, **options: Any) -> nn.Module:
    """`fully_shard` on every block and on the rest; every parameter is then a DTensor."""
    for block in blocks(model):
        fully_shard(block.module, **options)
    fully_shard(model, **{**options, **(root_options or {})})
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model


def perturb(module: nn.Module, scale: float, *, seed: int = 0) -> None:
    """Add noise that depends on the seed and on the shapes of the whole parameters alone."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        add(parameter, noise)


def add(parameter: torch.Tensor, whole: torch.Tensor) -> None:
    """Add a whole tensor to a parameter, or this process's part of it to its part of the parameter."""
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            part = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().add_(part.to_local())
        else:
            parameter.add_(whole)


def kept_parts(module: nn.Module) -> list[torch.Tensor]:
    """Copies of what this process holds of each parameter."""
    return [_part(parameter).clone() for parameter in module.parameters()]


def put_back(module: nn.Module, parts: list[torch.Tensor]) -> None:
    """Write copies of `kept_parts` back."""
    for parameter, part in zip(module.parameters(), parts, strict=True):
        _part(parameter).copy_(part)


def _part(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local().detach() if isinstance(parameter, DTensor) else parameter.detach()
