"""compressed-tensors, and llm-compressor in memory, which leaves `weight` as it was and rounds it in the forward pass.

Three storages: `weight_packed` (codes of 1 to 8 bits, packed into int32), a plain `weight` of codes (int8, float8)
with its `weight_scale`, and a float `weight` with a `quantization_scheme` under which every forward pass rounds it.
The first two are unpacked here from the format; the last by the rounding of compressed-tensors itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from weightproof.folders.readers import PackedWeight, Reading, plain_copy
from weightproof_callbacks.quantizers.packages import missing

_WORD = 32
_KNOWN = ("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape")
_BESIDE = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "input_global_scale")


class CompressedTensorsReader:
    """Reads modules that carry a `quantization_scheme`."""

    name = "compressed-tensors"

    def read(self, module: nn.Module) -> Reading:
        """The weight that the forward pass multiplies by, or why it cannot be read."""
        scheme = vars(module).get("quantization_scheme")
        args = getattr(scheme, "weights", None)
        own = _registered(module)
        if args is None or not {"weight", "weight_packed"} & own.keys():
            return None
        return _unknown(args, own) or _read(module, own, args)


def _read(module: nn.Module, own: Mapping[str, Tensor], args: Any) -> Reading:
    if "weight_packed" in own:
        return _packed(own, args, partial(_unpacked_values, args), _dense_shape(own))
    weight = own["weight"]
    if weight.ndim != 2:
        return None
    if weight.dtype.itemsize == 1:
        return _packed(own, args, partial(_codes_values, args), weight.shape)
    if not getattr(module, "quantization_enabled", True) or "weight_scale" not in own:
        return None  # the forward pass uses the weight as it is
    return missing("compressed_tensors") or _packed(own, args, partial(_rounded_values, args), weight.shape)


def _registered(module: nn.Module) -> dict[str, Tensor]:
    own = {**vars(module)["_parameters"], **vars(module)["_buffers"]}
    return {name: tensor for name, tensor in own.items() if isinstance(tensor, Tensor)}


def _unknown(args: Any, own: Mapping[str, Tensor]) -> str | None:
    """What nobody has tested, in words."""
    if args.dynamic:
        return "the scales of its weight are computed anew in each forward pass (dynamic)"
    if "weight_global_scale" in own or _text(args.strategy) in ("tensor_group", "block", "attn_head"):
        return f"its scales are laid out by {_text(args.strategy)}: only tensor, channel and group are known"
    if "weight_packed" in own and (_text(args.type) != "int" or own["weight_packed"].dtype != torch.int32):
        return (
            f"it packs codes of type {_text(args.type)} into {own['weight_packed'].dtype}: only int32 of int is known"
        )
    return None


def _text(value: object) -> str:
    """The value of an enumeration, or text."""
    return str(getattr(value, "value", value))


def _dense_shape(own: Mapping[str, Tensor]) -> torch.Size:
    return torch.Size(int(size) for size in own["weight_shape"])


def _packed(own: Mapping[str, Tensor], args: Any, values: Any, shape: torch.Size) -> PackedWeight:
    held = {name: own[name] for name in (*_KNOWN, *_BESIDE) if name in own}
    rebuild = partial(values, shape)
    return PackedWeight(
        name="weight",
        backend=CompressedTensorsReader.name,
        d_out=int(shape[0]),
        d_in=int(shape[1]),
        dtype=_dtype(held),
        registered=tuple(held),
        tensors=held,
        dequantize=partial(rebuild, held),
        bits=int(args.num_bits),
        group_size=args.group_size if args.group_size and args.group_size > 0 else None,
        rebuild=rebuild,
    )


def _dtype(held: Mapping[str, Tensor]) -> torch.dtype:
    weight = held.get("weight")
    return weight.dtype if weight is not None and weight.dtype.itemsize > 1 else held["weight_scale"].dtype


def _rounded_values(args: Any, shape: torch.Size, tensors: Mapping[str, Tensor]) -> Tensor:
    from compressed_tensors.quantization import (  # pyright: ignore[reportMissingImports] - the scheme comes from it
        fake_quantize,
    )

    zero = tensors.get("weight_zero_point")
    return plain_copy(fake_quantize(tensors["weight"].detach(), tensors["weight_scale"], zero, args))


def _codes_values(args: Any, shape: torch.Size, tensors: Mapping[str, Tensor]) -> Tensor:
    zero = tensors.get("weight_zero_point")
    return _scaled(tensors["weight"], tensors, None if zero is None else zero.float())


def _unpacked_values(args: Any, shape: torch.Size, tensors: Mapping[str, Tensor]) -> Tensor:
    codes = _unpacked(tensors["weight_packed"], int(args.num_bits), shape[1])
    zero = tensors.get("weight_zero_point")
    if zero is not None and zero.dtype == torch.int32 and not args.symmetric:
        zero = _unpacked(zero.T, int(args.num_bits), shape[0]).T
    return _scaled(codes, tensors, None if zero is None or args.symmetric else zero.float())


def _unpacked(words: Tensor, bits: int, length: int) -> Tensor:
    """Element i of a row lies at bit i * bits, the lowest first, across words; stored plus half the range."""
    start = torch.arange(length, device=words.device) * bits
    wide = words.to(torch.int64) & 0xFFFFFFFF
    wide = torch.nn.functional.pad(wide, (0, max(0, math.ceil(length * bits / _WORD) + 1 - wide.shape[1])))
    low, high = wide[:, start // _WORD], wide[:, start // _WORD + 1]
    codes = ((low | (high << _WORD)) >> (start % _WORD)) & (2**bits - 1)
    return codes - 2 ** (bits - 1)


def _scaled(codes: Tensor, tensors: Mapping[str, Tensor], zero: Tensor | None) -> Tensor:
    """(codes - zero) * scale, the scales spread over the inputs that share them."""
    scale = tensors["weight_scale"].detach()
    values = codes.detach().to(scale.dtype)
    if zero is not None:
        values = values - _spread(zero.to(scale.dtype), values.shape[1], tensors)
    return values * _spread(scale, values.shape[1], tensors)


def _spread(found: Tensor, d_in: int, tensors: Mapping[str, Tensor]) -> Tensor:
    if found.ndim < 2 or found.shape[1] == 1:
        return found.view(-1, 1) if found.numel() > 1 else found.reshape(())
    groups = tensors.get("weight_g_idx")
    if groups is not None and bool((groups >= 0).all()):
        return found[:, groups.long()]
    return found.repeat_interleave(-(-d_in // found.shape[1]), dim=1)[:, :d_in]
