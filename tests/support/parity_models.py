"""Models with something to lose, whole and stored in every way that a session reads, for tests of parity.

No training: every matrix is noise with two planted directions above its bulk, so that its spectrum has spikes, int8
keeps the outputs and int2 does not. Drawn from a seed and the shapes alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from architectures import build
from sharding import shard
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Cut
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


@dataclass(frozen=True)
class Model:
    """One model of the parity tests.

    Attributes:
        make: Builds it, whole.
        matrix: The tensor that most changes are made to, (an expert stack, for a mixture).
        other: Another one.
        norm: The gain of a norm.
        inputs: What a module without a configuration is called with: shape and dtype of a window.
        louder: Tensors times a factor, so that the outputs depend on the weights as those of a trained model do.
    """

    make: Callable[[], nn.Module]
    matrix: str
    other: str
    norm: str
    inputs: Mapping[str, tuple[tuple[int, ...], torch.dtype]] | None = None
    louder: Mapping[str, float] = field(default_factory=dict)

    def retain(self) -> list[dict[str, torch.Tensor]] | None:
        """Windows for a module whose inputs cannot be guessed."""
        if self.inputs is None:
            return None
        generator = torch.Generator().manual_seed(11)
        windows = [
            {name: torch.rand(shape, generator=generator) for name, (shape, _) in self.inputs.items()} for _ in range(5)
        ]
        return [
            {
                name: (60 * values).long()
                if self.inputs[name][1] is torch.long
                else (2 * values - 1).to(self.inputs[name][1])
                for name, values in window.items()
            }
            for window in windows
        ]


class Uneven(nn.Module):
    """Rows that no number of processes divides; fewer rows than four processes; a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, 31)
        self.mix = nn.Conv1d(31, 31, 3, padding=1)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(31, 53), nn.Tanh(), nn.Linear(53, 31)) for _ in range(2)])
        self.norm = nn.LayerNorm(31)
        self.lm_head = nn.Linear(31, 61, bias=False)
        self.switch = nn.Linear(31, 3)
        self.register_buffer("table", torch.linspace(0.5, 1.5, 31))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids) * self.table
        x = x + self.mix(x.mT).mT
        for layer in self.layers:
            x = x + layer(x)
        x = self.norm(x)
        return self.lm_head(x) * (1 + self.switch(x).mean(-1, keepdim=True))


def _plain() -> nn.Module:
    first, second, last = nn.Linear(40, 64), nn.Linear(64, 64), nn.Linear(64, 40)
    return nn.Sequential(first, nn.LayerNorm(64), nn.ReLU(), second, nn.ReLU(), last).to(torch.bfloat16)


_WIDE = {"hidden_size": 64, "intermediate_size": 90, "num_attention_heads": 4}
MODELS = {
    "gpt2": Model(
        lambda: build("gpt2", n_embd=64),
        "transformer.h.1.mlp.c_proj.weight", "transformer.h.0.attn.c_attn.weight", "transformer.h.1.ln_1.weight",
    ),
    "llama": Model(
        lambda: build("llama", **_WIDE),
        "model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.weight", "model.norm.weight",
    ),
    "bert": Model(
        lambda: build("bert"),
        "bert.encoder.layer.1.output.dense.weight",
        "bert.encoder.layer.0.attention.self.query.weight",
        "bert.encoder.layer.1.attention.output.LayerNorm.weight",
    ),
    "t5": Model(
        lambda: build("t5"),
        "decoder.block.1.layer.2.DenseReluDense.wo.weight",
        "encoder.block.0.layer.0.SelfAttention.k.weight",
        "decoder.final_layer_norm.weight",
        louder={"shared.weight": 6.0},
    ),
    "mixtral": Model(
        lambda: build("mixtral", num_local_experts=3),
        "model.layers.1.mlp.experts.down_proj", "model.layers.0.self_attn.o_proj.weight", "model.norm.weight",
    ),
    "sequential": Model(_plain, "3.weight", "0.weight", "1.weight", {"input": ((12, 40), torch.bfloat16)}),
    "uneven": Model(Uneven, "layers.1.0.weight", "lm_head.weight", "norm.weight", {"input_ids": ((16,), torch.long)}),
}  # fmt: skip


def whole(name: str) -> nn.Module:
    """A model on this process alone, the same on every one."""
    model = MODELS[name].make().eval()
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        _plant(parameter.data, generator)
    for tensor, factor in MODELS[name].louder.items():
        model.get_parameter(tensor).data.mul_(factor)
    return model


def _plant(values: torch.Tensor, generator: torch.Generator) -> None:
    noise = torch.randn(values.shape, generator=generator)
    if values.ndim < 2:
        # Gains, which are ones before, near one; biases near zero.
        values.copy_(values.float().round() + 0.05 * noise)
        return
    matrices = noise.reshape(-1, *values.shape[-2:]) if values.ndim == 3 else noise.flatten(1)[None]
    height, width = matrices.shape[1:]
    sigma = 0.5 / math.sqrt(width)
    for matrix in matrices:
        matrix.mul_(sigma)
        for strength in (2.4, 1.7):
            left, right = (nn.functional.normalize(torch.randn(n, generator=generator), dim=0) for n in (height, width))
            matrix.addr_(left, right, alpha=strength * sigma * (math.sqrt(height) + math.sqrt(width)))
    values.copy_(matrices.reshape(values.shape))


def stored(model: nn.Module, kind: str) -> nn.Module:
    """The model as a run of this kind stores it; asserts that it really does."""
    if kind == "DDP":
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert dist.get_world_size(wrapped.process_group) == dist.get_world_size()
        return wrapped
    if kind in ("FSDP2", "FSDP2 columns"):
        return _sharded(model, by_columns=kind != "FSDP2")
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    return model


def _sharded(model: nn.Module, *, by_columns: bool) -> nn.Module:
    size = dist.get_world_size()

    def place(parameter: nn.Parameter) -> Cut | None:
        return Cut(1) if parameter.ndim > 1 and parameter.shape[1] % size == 0 else None

    options: dict[str, Any] = {"shard_placement_fn": place} if by_columns else {}
    if isinstance(model, nn.Sequential):
        for child in model:
            if any(True for _ in child.parameters()):
                fully_shard(child, **options)
    shard(model, **options)
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor)
        assert parameter.device_mesh.size() == size == dist.get_world_size()
    dims = {placement.dim for p in model.parameters() for placement in p.placements}  # pyright: ignore[reportAttributeAccessIssue]
    assert dims == ({0, 1} if by_columns else {0}), dims
    return model


def unloaded(name: str) -> nn.Module:
    """A model without values, as it is before a checkpoint is read into its shards."""
    with torch.device("meta"):
        return MODELS[name].make()


def partly_readable() -> nn.Module:
    """A Llama on four processes: tensor parallelism under FSDP in its first block, FSDP over all in the rest."""
    model: Any = whole("llama")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    across = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    across |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
    along = {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    first, second = model.model.layers
    parallelize_module(first, mesh["tensor"], {**across, **along})
    fully_shard(first, mesh=mesh["data"])
    fully_shard(second)
    fully_shard(model)
    kinds = {type(placement).__name__ for parameter in first.parameters() for placement in parameter.placements}
    assert "_StridedShard" in kinds
    return model
