"""Changes of a model's weights, written in place: `write(model, generator)`, or `how(weight, generator)` of one matrix.

None of them knows what it is called in the benchmark or what is expected of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import weight_edits
from anatomy import Anatomy, Attention, Part, anatomy
from torch import Tensor, nn

Write = Callable[[nn.Module, torch.Generator], None]

# ---------------------------------------------------------------- small writes


def block_matrices(model: nn.Module) -> list[Tensor]:
    """Every matrix inside the blocks, as (d_out, d_in) views of live storage."""
    return [part.weight for _, part in parts_of(anatomy(model))]


def parts_of(parts: Anatomy) -> list[tuple[int, Part]]:
    """The linear maps of the blocks with the number of their block."""
    found: list[tuple[int, Part]] = []
    for index, layer in enumerate(parts.layers):
        found += [(index, part) for part in (layer.q, layer.k, layer.v, layer.o)]
    for index, mlp in enumerate(parts.mlps):
        found += [(index, part) for part in (mlp.up, mlp.down, mlp.gate) if part is not None]
    return found


def _noise(weight: Tensor, decibels: float, generator: torch.Generator) -> None:
    weight.add_(torch.randn(weight.shape, generator=generator) * weight.std() * 10 ** (-decibels / 20))


def noise_all(model: nn.Module, generator: torch.Generator, decibels: float) -> None:
    """White noise on every block matrix, this far below its standard deviation."""
    for weight in block_matrices(model):
        _noise(weight, decibels, generator)


def on_part(model: nn.Module, generator: torch.Generator, which: Callable[[Anatomy], Part], how: Any) -> None:
    """`how(weight, generator)` on one matrix."""
    how(which(anatomy(model)).weight, generator)


def redraw(weight: Tensor, generator: torch.Generator) -> None:
    """Random values of the same mean and standard deviation."""
    weight.copy_(torch.randn(weight.shape, generator=generator) * weight.std() + weight.mean())


def same_spectrum(weight: Tensor, generator: torch.Generator) -> None:
    """The same singular values with random singular vectors: no statistic of the spectrum moves."""
    values = torch.linalg.svdvals(weight)
    left = torch.linalg.qr(torch.randn(len(weight), len(values), generator=generator)).Q
    right = torch.linalg.qr(torch.randn(weight.shape[1], len(values), generator=generator)).Q
    weight.copy_(left * values @ right.T)


def rank_one_off(weight: Tensor, generator: torch.Generator) -> None:
    """Its largest singular pair removed."""
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    weight.sub_(S[0] * torch.outer(U[:, 0], Vh[0]))


def rank_one_on(weight: Tensor, generator: torch.Generator, size: float) -> None:
    """A random rank-one matrix added, of this many times the spectral norm."""
    left, right = torch.randn(len(weight), generator=generator), torch.randn(weight.shape[1], generator=generator)
    scale = size * torch.linalg.matrix_norm(weight, 2) / (left.norm() * right.norm())
    weight.add_(scale * torch.outer(left, right))


def scale(weight: Tensor, generator: torch.Generator, factor: float) -> None:
    """Times a factor."""
    weight.mul_(factor)


def noise(weight: Tensor, generator: torch.Generator, decibels: float) -> None:
    """White noise this far below its standard deviation."""
    _noise(weight, decibels, generator)


def flip_bit(weight: Tensor, generator: torch.Generator, bit: int) -> None:
    """One bit of one element of float32, bit 30 the highest of the exponent."""
    row = int(torch.randint(weight.shape[0], (1,), generator=generator))
    column = int(torch.randint(weight.shape[1], (1,), generator=generator))
    value = weight[row, column].clone().reshape(1).view(torch.int32)
    weight[row, column] = (value ^ (1 << bit)).view(torch.float32)[0]


def flip_signs(weight: Tensor, generator: torch.Generator, count: int) -> None:
    """The signs of its largest elements."""
    flat = weight.abs().flatten().topk(count).indices
    rows, columns = flat // weight.shape[1], flat % weight.shape[1]
    weight[rows, columns] = -weight[rows, columns]


def one_value(weight: Tensor, generator: torch.Generator, value: float) -> None:
    """One element becomes NaN or inf."""
    weight[int(torch.randint(len(weight), (1,), generator=generator)), 0] = value


def shuffle_rows(weight: Tensor, generator: torch.Generator) -> None:
    """Its rows in another order, as after a wrong order of shards."""
    weight.copy_(weight[torch.randperm(len(weight), generator=generator)])


def duplicate_shard(weight: Tensor, generator: torch.Generator) -> None:
    """Its first half twice, as after one shard was written for two."""
    half = len(weight) // 2
    weight[half : 2 * half] = weight[:half].clone()


def exchange(model: nn.Module, generator: torch.Generator, first: int, second: int) -> None:
    """Two blocks' weights change places."""
    blocks = anatomy(model).blocks
    ours, theirs = dict(blocks[first].named_parameters()), dict(blocks[second].named_parameters())
    for name, value in ours.items():
        kept = value.clone()
        value.copy_(theirs[name])
        theirs[name].copy_(kept)


def overwrite(model: nn.Module, generator: torch.Generator, values: dict[str, Tensor], part: str = "") -> None:
    """Parameters (those whose names hold `part`) become the given ones."""
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.copy_(values[name])


def along(model: nn.Module, generator: torch.Generator, way: dict[str, Tensor], alpha: float) -> None:
    """W + alpha D: a task vector."""
    for name, parameter in model.named_parameters():
        parameter.add_(alpha * way[name])


def round_to(model: nn.Module, generator: torch.Generator, dtype: torch.dtype) -> None:
    """Every parameter rounded to a dtype."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def fp8(model: nn.Module, generator: torch.Generator, dtype: torch.dtype, scaled: bool) -> None:
    """Block matrices rounded to an 8-bit float, by rows or as they are."""
    largest = torch.finfo(dtype).max
    for weight in block_matrices(model):
        step = weight.abs().amax(dim=1, keepdim=True) / largest if scaled else torch.ones(())
        weight.copy_((weight / step).clamp(-largest, largest).to(dtype).float() * step)


def norms(model: nn.Module, generator: torch.Generator, factor: float, last_only: bool) -> None:
    """Gains of norms times a factor."""
    if last_only:
        anatomy(model).final_norm.get_parameter("weight").mul_(factor)
        return
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter.mul_(factor)


def eps(model: Any, generator: torch.Generator) -> None:
    """The epsilon of every norm a thousand times the mean square of what it divides: no weight changes."""
    for module in model.modules():
        for name in ("variance_epsilon", "eps"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 10.0)


# ---------------------------------------------------------------- function-preserving


def _rotation(size: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q.float()


def rotate_values(model: nn.Module, generator: torch.Generator) -> None:
    """W_v -> R W_v and W_o -> W_o R^T in every head (one R for the query heads that share a key-value head)."""
    for layer in anatomy(model).layers:
        size = layer.q.weight.shape[0] // layer.num_heads
        shared = layer.num_heads // layer.num_kv_heads
        for head in range(layer.num_kv_heads):
            turn = _rotation(size, generator)
            rows = slice(head * size, (head + 1) * size)
            _turn_rows(layer.v, rows, turn)
            for query in range(head * shared, (head + 1) * shared):
                columns = slice(query * size, (query + 1) * size)
                layer.o.weight[:, columns] = layer.o.weight[:, columns] @ turn.T


def rotate_scores(model: nn.Module, generator: torch.Generator) -> None:
    """W_q -> R W_q and W_k -> R W_k in every head: scores are inner products. Not with rotary embeddings."""
    for layer in anatomy(model).layers:
        size = layer.q.weight.shape[0] // layer.num_heads
        for head in range(layer.num_heads):
            turn = _rotation(size, generator)
            for part in (layer.q, layer.k):
                _turn_rows(part, slice(head * size, (head + 1) * size), turn)


def _turn_rows(part: Part, rows: slice, turn: Tensor) -> None:
    part.weight[rows] = turn @ part.weight[rows]
    if part.bias is not None:
        part.bias[rows] = turn @ part.bias[rows]


def rescale_scores(model: nn.Module, generator: torch.Generator, factor: float) -> None:
    """W_q times c, W_k over c, biases too."""
    for layer in anatomy(model).layers:
        _scale_part(layer.q, factor)
        _scale_part(layer.k, 1 / factor)


def rescale_values(model: nn.Module, generator: torch.Generator, factor: float, only: int | None = None) -> None:
    """W_v (and its bias) times c, W_o over c."""
    for index, layer in enumerate(anatomy(model).layers):
        if only in (None, index):
            _scale_part(layer.v, factor)
            layer.o.weight.div_(factor)


def rescale_mlp(model: nn.Module, generator: torch.Generator, factor: float, only: int | None = None) -> None:
    """Up-projection times c, down-projection over c: gated MLPs."""
    for index, mlp in enumerate(anatomy(model).mlps):
        if only in (None, index):
            _scale_part(mlp.up, factor)
            mlp.down.weight.div_(factor)


def _scale_part(part: Part, factor: float) -> None:
    part.weight.mul_(factor)
    if part.bias is not None:
        part.bias.mul_(factor)


def permute_heads(model: nn.Module, generator: torch.Generator) -> None:
    """Key-value heads in a random order, their query heads with them."""
    for layer in anatomy(model).layers:
        _reorder(layer, torch.randperm(layer.num_kv_heads, generator=generator))


def _reorder(layer: Attention, order: Tensor) -> None:
    shared = layer.num_heads // layer.num_kv_heads
    q_order = (order[:, None] * shared + torch.arange(shared)).reshape(-1)
    weight_edits._reorder_heads(layer, q_order, order)


def permute_neurons(model: nn.Module, generator: torch.Generator, only: int | None = None) -> None:
    """The hidden neurons of the MLPs in a random order."""
    for index, mlp in enumerate(anatomy(model).mlps):
        if only in (None, index):
            order = torch.randperm(mlp.up.weight.shape[0], generator=generator)
            for part in (mlp.up, mlp.gate):
                if part is not None:
                    part.weight.copy_(part.weight[order])
                    if part.bias is not None:
                        part.bias.copy_(part.bias[order])
            mlp.down.weight.copy_(mlp.down.weight[:, order])


def reload(model: nn.Module, generator: torch.Generator) -> None:
    """Every tensor written over itself."""
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})


def together(*writes: Write) -> Write:
    """One after another."""

    def write(model: nn.Module, generator: torch.Generator) -> None:
        for one in writes:
            one(model, generator)

    return write


def fold(model: nn.Module, generator: torch.Generator) -> None:
    """Gains of pre-norms moved into what reads them."""
    weight_edits.fold_norms(model)
