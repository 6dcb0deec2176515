"""Every backend, and how it is applied to the linear layers in the blocks of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from optimum.quanto import freeze, qfloat8, qint4, qint8, quantize
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)

from weightproof import kinds


@dataclass(frozen=True)
class Backend:
    """One way of quantizing: what it is called in readings, and what an int8 of it promises.

    `tolerance` bounds |module(identity) - bias - what was read| over the largest weight: the rounding of the kernel,
    and of activations where the backend rounds those too.
    """

    storage: str
    apply: Callable[[nn.Module], object]
    int8: kinds.Quantize | None = None
    tolerance: float = 1e-5


def block_linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name, layer) of every linear layer inside of the blocks."""
    head = getattr(model, "lm_head", None)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not head:
                yield parent, name, child


def _replace(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    for parent, name, layer in list(block_linears(model)):
        setattr(parent, name, make(layer))


def _in_block(module: nn.Module, name: str) -> bool:
    return type(module) is nn.Linear and "head" not in name


def _torchao(config: Any) -> Callable[[nn.Module], object]:
    return lambda model: quantize_(model, config, filter_fn=_in_block)


def _bnb_4bit(nested: bool, kind: str, *, inference: bool = False) -> Callable[[nn.Module], object]:
    """`inference`: in eval mode, where the first forward pass may arrange the codes anew for the CPU."""

    def make(layer: nn.Linear) -> nn.Module:
        fresh = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            quant_type=kind,
            compress_statistics=nested,
            compute_dtype=torch.float32,
        )
        fresh.load_state_dict(layer.state_dict())
        return fresh.to("cpu").train(not inference)

    return lambda model: _replace(model, make)


def _bnb_8bit(model: nn.Module) -> None:
    def make(layer: nn.Linear) -> nn.Module:
        fresh = bnb.nn.Linear8bitLt(
            layer.in_features, layer.out_features, bias=layer.bias is not None, has_fp16_weights=False
        )
        fresh.load_state_dict(layer.state_dict())
        return fresh.to("cpu")

    _replace(model, make)


def _quanto(qtype: Any) -> Callable[[nn.Module], object]:
    def apply(model: nn.Module) -> None:
        quantize(model, weights=qtype, exclude=["lm_head"])
        freeze(model)

    return apply


def _hqq(bits: int, group_size: int | None) -> Callable[[nn.Module], object]:
    def make(layer: nn.Linear) -> nn.Module:
        config = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=1)
        return HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu")

    return lambda model: _replace(model, make)


def _dynamic(model: nn.Module) -> None:
    for parent, name, layer in list(block_linears(model)):
        box = nn.ModuleDict({"layer": layer})
        quantize_dynamic(box, {nn.Linear}, dtype=torch.qint8, inplace=True)
        setattr(parent, name, box["layer"])


def _scheme(**options: Any) -> Callable[[nn.Module], object]:
    """What llm-compressor's data-free oneshot leaves in memory: the weight as it was, rounded in each forward pass."""

    def apply(model: nn.Module) -> None:
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**options))
        layers = [layer for _, _, layer in block_linears(model)]
        apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"]))
        for layer in layers:
            weight, args = layer.weight.detach(), layer.quantization_scheme.weights
            groups = weight if args.group_size is None else weight.view(len(weight), -1, args.group_size)
            dim = {"dim": -1, "keepdim": args.group_size is None}
            scale, zero = calculate_qparams(groups.amin(**dim), groups.amax(**dim), args)
            layer.weight_scale.data.copy_(scale)
            layer.weight_zero_point.data.copy_(zero)
            layer.quantization_status = QuantizationStatus.FROZEN

    return apply


CHANNEL, TENSOR = kinds.Quantize(8), kinds.Quantize(8, "tensor")
BACKENDS = {
    "torchao int8": Backend("torchao", _torchao(Int8WeightOnlyConfig()), CHANNEL),
    "torchao int8 dynamic": Backend("torchao", _torchao(Int8DynamicActivationInt8WeightConfig()), CHANNEL, 0.02),
    "torchao float8": Backend("torchao", _torchao(Float8WeightOnlyConfig())),
    "torchao int4": Backend(
        "torchao", _torchao(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    ),
    "bitsandbytes int8": Backend("bitsandbytes-8bit", _bnb_8bit, CHANNEL, 0.02),
    "bitsandbytes nf4": Backend("bitsandbytes-4bit", _bnb_4bit(False, "nf4")),
    "bitsandbytes nf4 at inference": Backend(
        "bitsandbytes-4bit", _bnb_4bit(False, "nf4", inference=True), tolerance=0.02
    ),
    "bitsandbytes fp4 nested at inference": Backend(
        "bitsandbytes-4bit", _bnb_4bit(True, "fp4", inference=True), tolerance=0.02
    ),
    "bitsandbytes fp4 nested": Backend("bitsandbytes-4bit", _bnb_4bit(True, "fp4")),
    "quanto int8": Backend("quanto", _quanto(qint8), CHANNEL),
    "quanto int4": Backend("quanto", _quanto(qint4)),
    "quanto float8": Backend("quanto", _quanto(qfloat8)),
    "hqq int8": Backend("hqq", _hqq(8, None), CHANNEL),
    "hqq int4": Backend("hqq", _hqq(4, 32)),
    "hqq int3": Backend("hqq", _hqq(3, 64)),
    "torch dynamic int8": Backend("torch-dynamic", _dynamic, TENSOR, 0.02),
    "compressed-tensors int8": Backend("compressed-tensors", _scheme(num_bits=8, strategy="channel"), CHANNEL),
    "compressed-tensors int4": Backend(
        "compressed-tensors", _scheme(num_bits=4, strategy="group", group_size=32, symmetric=False)
    ),
    "compressed-tensors float8": Backend("compressed-tensors", _scheme(num_bits=8, type="float", strategy="channel")),
}
INT8 = [name for name, backend in BACKENDS.items() if backend.int8 is not None]
