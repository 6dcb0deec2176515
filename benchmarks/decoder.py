"""A decoder of GPT-2 small's shapes in plain torch, filled with the synthetic matrices of speed.py; sharded or not."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.distributed as dist
from speed import SHAPES, make_matrix
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional

WIDTH, HEADS, VOCABULARY, POSITIONS = 768, 12, 8192, 256

PLACES = ("replicated", "rows", "columns")


class Block(nn.Module):
    """Attention and a feed-forward network, each with its norm and residual; `index` seeds its matrices."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv_proj, self.out_proj, self.up_proj, self.down_proj = (nn.Linear(n, m) for m, n in SHAPES)
        for position, linear in enumerate((self.qkv_proj, self.out_proj, self.up_proj, self.down_proj)):
            linear.weight = nn.Parameter(make_matrix(len(SHAPES) * index + position))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, tokens, width) to the same."""
        parts = self.qkv_proj(self.ln_1(x)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out_proj(mixed.transpose(1, 2).flatten(2))
        return x + self.down_proj(functional.gelu(self.up_proj(self.ln_2(x))))


class Decoder(nn.Module):
    """Blocks between token embeddings, tied to the head, and logits."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(vocab_size=VOCABULARY, max_position_embeddings=POSITIONS)
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block(index) for index in range(num_blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits (rows, tokens, vocabulary) of token ids (rows, tokens)."""
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


class Single(nn.Module):
    """One bare matrix."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.up_proj = nn.Linear(*shape[::-1], bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product with the transpose."""
        return self.up_proj(x)


class Stack(nn.Module):
    """Bare matrices of one shape, for what is measured per matrix; it computes nothing."""

    def __init__(self, shape: tuple[int, int], count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Single(shape) for _ in range(count))
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02, generator=generator)


def placed(model: nn.Module, place: str, size: int) -> nn.Module:
    """The model as `size` processes hold it: whole (in DDP), or FSDP2 shards cut along rows or columns."""
    if size == 1:
        return model
    if place == "replicated":
        return nn.parallel.DistributedDataParallel(model)
    dim = PLACES.index(place) - 1
    cut = {"shard_placement_fn": lambda parameter: Shard(dim if parameter.ndim > 1 else 0)}
    for layer in model.layers:  # pyright: ignore
        fully_shard(layer, **cut)
    fully_shard(model, **cut)
    assert dist.get_world_size() == size
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model
