"""Edits of a model's weights as data: those that break it, and those that leave its function as it was.

Every edit is deterministic, writes in place and works on GPT-2, Llama, BERT and T5 (see `anatomy`).
`NOT_ADMITTED` says which architecture does not admit which function-preserving edit, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from anatomy import Attention, AttentionGroup, anatomy
from torch import nn

SCALE = 20.0
"""Factor of the rescaling edits: beyond the gross limits of weight statistics, without any effect on the function."""


@dataclass(frozen=True)
class Edit:
    """A named change of a model's weights; `apply(model)` writes in place."""

    name: str
    apply: Callable[[Any], None]


def _generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _matrices(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield every weight with two or more dimensions once, tied copies too."""
    return (parameter for parameter in model.parameters() if parameter.ndim >= 2)


def _redraw(weight: torch.Tensor, generator: torch.Generator) -> None:
    weight.copy_(torch.randn(weight.shape, generator=generator) * weight.std() + weight.mean())


def _rank_one(weight: torch.Tensor) -> None:
    U, singular_values, Vh = torch.linalg.svd(weight, full_matrices=False)
    weight.copy_(singular_values[0] * torch.outer(U[:, 0], Vh[0]))


# ---- harmful --------------------------------------------------------------------------------------------------------


def scale_all(model: nn.Module, factor: float) -> None:
    for weight in _matrices(model):
        weight.mul_(factor)


def scale_attention_output(model: nn.Module, factor: float) -> None:
    anatomy(model).layers[0].o.weight.mul_(factor)


def scale_mlp_up(model: nn.Module, factor: float) -> None:
    anatomy(model).mlps[0].up.weight.mul_(factor)


def scale_last_down(model: nn.Module, factor: float) -> None:
    anatomy(model).mlps[-1].down.weight.mul_(factor)


def rank_one_all(model: nn.Module) -> None:
    for weight in _matrices(model):
        _rank_one(weight)


def rank_one_last_down(model: nn.Module) -> None:
    _rank_one(anatomy(model).mlps[-1].down.weight)


def one_nan(model: nn.Module) -> None:
    anatomy(model).mlps[0].down.weight[3, 5] = float("nan")


def one_inf_in_norm(model: nn.Module) -> None:
    next(p for name, p in model.named_parameters() if "norm" in name.lower() or "ln_" in name)[2] = float("inf")


def redraw_all(model: nn.Module) -> None:
    generator = _generator()
    for weight in _matrices(model):
        _redraw(weight, generator)


def redraw_head(model: nn.Module) -> None:
    _redraw(anatomy(model).head, _generator())


def permute_head_rows(model: nn.Module) -> None:
    head = anatomy(model).head
    head.copy_(head[torch.randperm(len(head), generator=_generator())])


def negate_final_norm(model: nn.Module) -> None:
    anatomy(model).final_norm.get_parameter("weight").neg_()


def replace_module(model: nn.Module) -> None:
    """Put a freshly initialised module of the same class and shape in the place of an MLP up-projection."""
    parent, name = anatomy(model).replaceable
    old = parent.get_submodule(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        if isinstance(old, nn.Linear):
            new: nn.Module = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
        else:  # GPT-2's Conv1D stores (in, out)
            rows, columns = old.get_parameter("weight").shape
            new = type(old)(columns, rows)
    setattr(parent, name, new)


def swap_block_weights(model: nn.Module) -> None:
    blocks = anatomy(model).blocks
    first, last = dict(blocks[0].named_parameters()), dict(blocks[-1].named_parameters())
    for name in first.keys() & last.keys():
        kept = first[name].clone()
        first[name].copy_(last[name])
        last[name].copy_(kept)


def swap_block_modules(model: nn.Module) -> None:
    blocks = anatomy(model).blocks
    blocks[0], blocks[-1] = blocks[-1], blocks[0]


HARMFUL = (
    Edit("all matrices x1000", partial(scale_all, factor=1000.0)),
    Edit("attention output x100", partial(scale_attention_output, factor=100.0)),
    Edit("mlp up x100", partial(scale_mlp_up, factor=100.0)),
    Edit("last mlp down x1000", partial(scale_last_down, factor=1000.0)),
    Edit("all zero", partial(scale_all, factor=0.0)),
    Edit("all rank 1", rank_one_all),
    Edit("last mlp down rank 1", rank_one_last_down),
    Edit("one NaN", one_nan),
    Edit("one inf in a norm", one_inf_in_norm),
    Edit("all re-drawn, equal std", redraw_all),
    Edit("head re-drawn", redraw_head),
    Edit("head rows permuted", permute_head_rows),
    Edit("final norm negated", negate_final_norm),
    Edit("linear replaced by another", replace_module),
    Edit("two layers swapped (weights)", swap_block_weights),
    Edit("two layers swapped (modules)", swap_block_modules),
)


# ---- harmless: small ------------------------------------------------------------------------------------------------


def no_edit(model: nn.Module) -> None:
    del model


def relative_noise(model: nn.Module, size: float) -> None:
    generator = _generator()
    for weight in model.parameters():
        weight.mul_(1 + size * torch.randn(weight.shape, generator=generator))


def cast_to_bf16(model: nn.Module) -> None:
    model.to(torch.bfloat16)


def round_to_bf16(model: nn.Module) -> None:
    """Round every parameter to bf16 precision, kept in its own dtype."""
    for weight in model.parameters():
        weight.copy_(weight.to(torch.bfloat16))


def int8_per_channel(model: nn.Module) -> None:
    """Simulate symmetric 8-bit quantization of every linear map, one scale per output channel."""
    parts = anatomy(model)
    linears = [part for layer in parts.layers for part in (layer.q, layer.k, layer.v, layer.o)]
    linears += [part for mlp in parts.mlps for part in (mlp.up, mlp.down, mlp.gate) if part is not None]
    for part in linears:
        step = part.weight.abs().amax(dim=1, keepdim=True) / 127
        part.weight.copy_(torch.round(part.weight / step) * step)


SMALL = (
    Edit("no edit", no_edit),
    Edit("1e-7 relative noise", partial(relative_noise, size=1e-7)),
    Edit("bf16 cast", cast_to_bf16),
    Edit("bf16 rounding in fp32", round_to_bf16),
    Edit("int8 per channel", int8_per_channel),
)


# ---- harmless: function-preserving ----------------------------------------------------------------------------------


def permute_heads(model: nn.Module) -> None:
    """Rotate key-value heads with their query heads, and reverse the query heads within each group."""
    for group in anatomy(model).attention:
        _permute_group(group)


def _permute_group(group: AttentionGroup) -> None:
    first = group.layers[0]
    shared = first.num_heads // first.num_kv_heads
    kv_order = torch.arange(first.num_kv_heads).roll(1)
    q_order = (kv_order[:, None] * shared + torch.arange(shared).flip(0)).reshape(-1)
    for layer in group.layers:
        _reorder_heads(layer, q_order, kv_order)
    if group.bias_table is not None:
        group.bias_table.copy_(group.bias_table[:, q_order])


def _reorder_heads(layer: Attention, q_order: torch.Tensor, kv_order: torch.Tensor) -> None:
    size = layer.q.weight.shape[0] // layer.num_heads
    q_rows = (q_order[:, None] * size + torch.arange(size)).reshape(-1)
    kv_rows = (kv_order[:, None] * size + torch.arange(size)).reshape(-1)
    for part, rows in ((layer.q, q_rows), (layer.k, kv_rows), (layer.v, kv_rows)):
        part.weight.copy_(part.weight[rows])
        if part.bias is not None:
            part.bias.copy_(part.bias[rows])
    layer.o.weight.copy_(layer.o.weight[:, q_rows])


def permute_neurons(model: nn.Module) -> None:
    """Permute the hidden neurons of every MLP."""
    generator = _generator()
    for mlp in anatomy(model).mlps:
        order = torch.randperm(mlp.up.weight.shape[0], generator=generator)
        for part in (mlp.up, mlp.gate):
            if part is not None:
                part.weight.copy_(part.weight[order])
                if part.bias is not None:
                    part.bias.copy_(part.bias[order])
        mlp.down.weight.copy_(mlp.down.weight[:, order])


def rescale_value_output(model: nn.Module) -> None:
    """W_v (and its bias) times c, W_o over c: attention mixes values linearly."""
    for layer in anatomy(model).layers:
        layer.v.weight.mul_(SCALE)
        if layer.v.bias is not None:
            layer.v.bias.mul_(SCALE)
        layer.o.weight.div_(SCALE)


def rescale_mlp(model: nn.Module) -> None:
    """Up-projection (and its bias) times c, down-projection over c: for gated and for ReLU MLPs."""
    for mlp in anatomy(model).mlps:
        mlp.up.weight.mul_(SCALE)
        if mlp.up.bias is not None:
            mlp.up.bias.mul_(SCALE)
        mlp.down.weight.div_(SCALE)


def fold_norms(model: nn.Module) -> None:
    """Move the gain (and bias) of every foldable pre-norm into the linear maps that read it."""
    for norm in anatomy(model).foldable_norms:
        for part in norm.feeds:
            if norm.bias is not None:
                assert part.bias is not None
                part.bias.add_(part.weight @ norm.bias)
            part.weight.mul_(norm.gain)
        norm.gain.fill_(1.0)
        if norm.bias is not None:
            norm.bias.zero_()


PRESERVING = (
    Edit("head permutation", permute_heads),
    Edit("neuron permutation", permute_neurons),
    Edit("W_v*c with W_o/c", rescale_value_output),
    Edit("W_up*c with W_down/c", rescale_mlp),
    Edit("pre-norm gain folded", fold_norms),
)

NOT_ADMITTED = {
    ("gpt2", "W_up*c with W_down/c"): "GELU is not positively homogeneous",
    ("bert", "W_up*c with W_down/c"): "GELU is not positively homogeneous",
    ("bert", "pre-norm gain folded"): "post-norm: the residual stream reads the norm's output too",
}
"""(architecture, edit) -> why it would change the function; final norms before a tied head (GPT-2, T5) stay unfolded"""


def preserving_edits(architecture: str) -> tuple[Edit, ...]:
    """Return the function-preserving edits that an architecture admits."""
    return tuple(edit for edit in PRESERVING if (architecture, edit.name) not in NOT_ADMITTED)


def harmless_edits(architecture: str) -> tuple[Edit, ...]:
    """Return every edit that must be kept on an architecture."""
    return SMALL + preserving_edits(architecture)


def apply_edit(edit: Edit, model: nn.Module) -> None:
    """Apply an edit in place, outside autograd."""
    with torch.no_grad():
        edit.apply(model)
