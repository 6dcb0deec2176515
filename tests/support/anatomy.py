"""The parts of GPT-2, Llama, BERT and T5 that the weight edits speak of, as live views.

A `Part` is a linear map seen as (d_out, d_in) with its bias: writing into the view writes into the
model, whatever the layout (GPT-2 keeps (in, out) and fuses q, k, v into one Conv1D).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, eq=False)
class Part:
    """A linear map: `weight` is a (d_out, d_in) view of live storage, `bias` (d_out,) or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention layer; each group of `num_heads // num_kv_heads` query heads shares a key-value head."""

    q: Part
    k: Part
    v: Part
    o: Part
    num_heads: int
    num_kv_heads: int


@dataclass(frozen=True, eq=False)
class AttentionGroup:
    """Layers whose heads must be permuted alike, because they share `bias_table` (buckets, heads)."""

    layers: tuple[Attention, ...]
    bias_table: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Mlp:
    """down(act(ups...)). `gate` is not scalable; `up` is, where the activation lets a scale through."""

    up: Part
    down: Part
    gate: Part | None = None


@dataclass(frozen=True, eq=False)
class Norm:
    """A pre-norm and every linear map that reads its output."""

    gain: torch.Tensor
    bias: torch.Tensor | None
    feeds: tuple[Part, ...]


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Everything the edits need to know about one architecture."""

    attention: tuple[AttentionGroup, ...]
    mlps: tuple[Mlp, ...]
    foldable_norms: tuple[Norm, ...]
    scalable_up: bool
    final_norm: nn.Module
    head: torch.Tensor
    blocks: nn.ModuleList
    replaceable: tuple[nn.Module, str]

    @property
    def layers(self) -> tuple[Attention, ...]:
        """All attention layers, in order."""
        return tuple(layer for group in self.attention for layer in group.layers)


def anatomy(model: Any) -> Anatomy:
    """Return the parts of a GPT-2, Llama, BERT or T5 model."""
    return {"gpt2": _gpt2, "llama": _llama, "bert": _bert, "t5": _t5}[model.config.model_type](model)


def _linear(module: Any) -> Part:
    return Part(module.weight, module.bias)


def _conv1d(module: Any, rows: slice = slice(None)) -> Part:
    return Part(module.weight.t()[rows], module.bias[rows])


def _gpt2(model: Any) -> Anatomy:
    config, width = model.config, model.config.n_embd
    layers, mlps, norms = [], [], []
    for block in model.transformer.h:
        q, k, v = (_conv1d(block.attn.c_attn, slice(i * width, (i + 1) * width)) for i in range(3))
        layers.append(Attention(q, k, v, _conv1d(block.attn.c_proj), config.n_head, config.n_head))
        mlps.append(Mlp(_conv1d(block.mlp.c_fc), _conv1d(block.mlp.c_proj)))
        norms.append(Norm(block.ln_1.weight, block.ln_1.bias, (q, k, v)))
        norms.append(Norm(block.ln_2.weight, block.ln_2.bias, (mlps[-1].up,)))
    return Anatomy(
        attention=tuple(AttentionGroup((layer,)) for layer in layers),
        mlps=tuple(mlps),
        foldable_norms=tuple(norms),
        scalable_up=False,
        final_norm=model.transformer.ln_f,
        head=model.lm_head.weight,
        blocks=model.transformer.h,
        replaceable=(model.transformer.h[1].mlp, "c_fc"),
    )


def _llama(model: Any) -> Anatomy:
    config = model.config
    layers, mlps, norms = [], [], []
    for block in model.model.layers:
        attn, mlp = block.self_attn, block.mlp
        q, k, v, o = (_linear(m) for m in (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj))
        layers.append(Attention(q, k, v, o, config.num_attention_heads, config.num_key_value_heads))
        mlps.append(Mlp(_linear(mlp.up_proj), _linear(mlp.down_proj), _linear(mlp.gate_proj)))
        norms.append(Norm(block.input_layernorm.weight, None, (q, k, v)))
        norms.append(Norm(block.post_attention_layernorm.weight, None, (_linear(mlp.gate_proj), mlps[-1].up)))
    norms.append(Norm(model.model.norm.weight, None, (_linear(model.lm_head),)))
    return Anatomy(
        attention=tuple(AttentionGroup((layer,)) for layer in layers),
        mlps=tuple(mlps),
        foldable_norms=tuple(norms),
        scalable_up=True,
        final_norm=model.model.norm,
        head=model.lm_head.weight,
        blocks=model.model.layers,
        replaceable=(model.model.layers[1].mlp, "up_proj"),
    )


def _bert(model: Any) -> Anatomy:
    heads = model.config.num_attention_heads
    layers, mlps = [], []
    for block in model.bert.encoder.layer:
        own = block.attention.self
        q, k, v, o = (_linear(m) for m in (own.query, own.key, own.value, block.attention.output.dense))
        layers.append(Attention(q, k, v, o, heads, heads))
        mlps.append(Mlp(_linear(block.intermediate.dense), _linear(block.output.dense)))
    return Anatomy(
        attention=tuple(AttentionGroup((layer,)) for layer in layers),
        mlps=tuple(mlps),
        foldable_norms=(),
        scalable_up=False,
        final_norm=model.cls.predictions.transform.LayerNorm,
        head=model.cls.predictions.decoder.weight,
        blocks=model.bert.encoder.layer,
        replaceable=(model.bert.encoder.layer[1].intermediate, "dense"),
    )


def _t5_attention(module: Any, heads: int) -> Attention:
    q, k, v, o = (_linear(m) for m in (module.q, module.k, module.v, module.o))
    return Attention(q, k, v, o, heads, heads)


def _t5(model: Any) -> Anatomy:
    heads = model.config.num_heads
    groups, mlps, norms, cross_inputs = [], [], [], []
    for stack in (model.encoder, model.decoder):
        own_layers, cross_layers = [], []
        for block in stack.block:
            own = _t5_attention(block.layer[0].SelfAttention, heads)
            own_layers.append(own)
            norms.append(Norm(block.layer[0].layer_norm.weight, None, (own.q, own.k, own.v)))
            if stack is model.decoder:
                cross = _t5_attention(block.layer[1].EncDecAttention, heads)
                cross_layers.append(cross)
                norms.append(Norm(block.layer[1].layer_norm.weight, None, (cross.q,)))
                cross_inputs += [cross.k, cross.v]
            dense = block.layer[-1].DenseReluDense
            mlps.append(Mlp(_linear(dense.wi), _linear(dense.wo)))
            norms.append(Norm(block.layer[-1].layer_norm.weight, None, (mlps[-1].up,)))
        table = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        groups.append(AttentionGroup(tuple(own_layers), table))
        groups += [AttentionGroup((cross,)) for cross in cross_layers]
    # the encoder's output is read by the decoder's cross-attention only
    norms.append(Norm(model.encoder.final_layer_norm.weight, None, tuple(cross_inputs)))
    return Anatomy(
        attention=tuple(groups),
        mlps=tuple(mlps),
        foldable_norms=tuple(norms),
        scalable_up=True,
        final_norm=model.decoder.final_layer_norm,
        head=model.lm_head.weight,
        blocks=model.decoder.block,
        replaceable=(model.decoder.block[1].layer[2].DenseReluDense, "wi"),
    )
