"""A small model with every kind of matrix, sharded for real: FSDP2, and parameters as ZeRO-3 leaves them."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D


class ToyExperts(nn.Module):
    """Three experts (E, out, in), and three stored (E, in, out)."""

    def __init__(self, is_transposed: bool):
        super().__init__()
        self.is_transposed = is_transposed
        self.up_proj = nn.Parameter(torch.randn(3, *((16, 10) if is_transposed else (10, 16))) / 4)

    def forward(self, x):
        stack = self.up_proj if self.is_transposed else self.up_proj.mT
        return torch.einsum("...i,eio->...o", x, stack)


class ToyBlock(nn.Module):
    def __init__(self, is_transposed: bool):
        super().__init__()
        self.q_proj = nn.Linear(16, 16)
        self.c_fc = Conv1D(9, 16)
        self.experts = ToyExperts(is_transposed)
        self.down_proj = nn.Linear(19, 16, bias=False)
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        x = x + self.q_proj(x)
        return x + self.down_proj(torch.cat([torch.relu(self.c_fc(self.norm(x))), self.experts(x)], dim=-1))


class ToyModel(nn.Module):
    """Embeddings tied to the head, a convolution, two blocks, a buffer. 37 rows: uneven for 2, 3 and 4."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(37, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.layers = nn.ModuleList([ToyBlock(False), ToyBlock(True)])
        self.lm_head = nn.Linear(16, 37, bias=False)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor([0.5]))

    def forward(self, ids):
        x = self.embed(ids) * self.scale
        x = x + self.conv(x.mT).mT
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def ids(seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 37, (4, 6), generator=torch.Generator().manual_seed(seed))


def shard(model: nn.Module, **options) -> nn.Module:
    """FSDP2 around each block and the root; every parameter is then a DTensor, or this raises."""
    for layer in model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model


def partition(parameter: nn.Parameter, rank: int, size: int) -> nn.Parameter:
    """A parameter as DeepSpeed ZeRO-3 leaves it: shape (0,), and a padded flat partition in `ds_tensor`."""
    flat = parameter.detach().reshape(-1)
    length = -(-flat.numel() // size)
    padded = torch.cat([flat, torch.full((length * size - flat.numel(),), 77.0, dtype=flat.dtype)])
    parameter.ds_shape, parameter.ds_numel = parameter.shape, parameter.numel()
    parameter.ds_tensor = padded[rank * length : (rank + 1) * length].clone()
    parameter.ds_tensor.ds_numel = length
    parameter.ds_tensor.status = SimpleNamespace(name="AVAILABLE")
    parameter.ds_status = SimpleNamespace(name="NOT_AVAILABLE")
    parameter.ds_zero_partition_rank, parameter.ds_zero_partition_world_size = rank, size
    parameter.ds_secondary_tensor = None
    parameter.ds_process_group = dist.group.WORLD if dist.is_initialized() else None
    parameter.data = torch.empty(0, dtype=parameter.dtype)
    return parameter


def partition_all(model: nn.Module, rank: int, size: int) -> nn.Module:
    """Every parameter of a model, as under ZeRO-3."""
    for parameter in model.parameters():
        partition(parameter, rank, size)
    return model
