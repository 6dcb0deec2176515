"""GPTQ and AWQ containers: codes packed into int32 (`qweight`, `qzeros`) with float `scales`, one group after another.

Both compute W[i, o] = scales[group(i), o] * (codes[i, o] - zeros[group(i), o]) for input i and output o, so the matrix
is turned on the way. GPTQ packs codes along the inputs and names each input's group in `g_idx`; its older format
(`qzero_format()` 1, and whatever has no such method) keeps every zero point minus one, unless the module's kernel
takes them as they are (`REQUIRES_FORMAT_V2`: GPTQModel converts while it loads, and leaves the number). AWQ packs
both along the outputs, in the order 0 2 4 6 1 3 5 7 within a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from weightproof.folders.readers import PackedWeight, Reading

_WORD = 32
_WIDTHS = (2, 4, 8)
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class GptqReader:
    """Reads QuantLinear of GPTQModel, AutoGPTQ and AutoRound: `qweight`, `qzeros`, `scales` and `g_idx`."""

    name = "gptq"

    def read(self, module: nn.Module) -> Reading:
        """The packed weight, or why it has none that can be read."""
        tensors = _container(module, "g_idx")
        if tensors is None:
            return None
        bits = getattr(module, "bits", None)
        rows = tensors["qweight"].shape[0]
        if bits not in _WIDTHS or tensors["qweight"].dtype != torch.int32:
            return f"codes of {bits} bits in {tensors['qweight'].dtype}: only 2, 4 and 8 bits in int32 are known"
        if tensors["g_idx"].numel() * bits != rows * _WORD:
            return "its codes are not laid out by inputs (a kernel has rearranged them): load it with a torch backend"
        return _packed(module, self.name, tensors, partial(_gptq, bits, _zero_offset(module)), bits)


def _zero_offset(module: Any) -> int:
    """What the module's own kernel adds to a stored zero point."""
    if getattr(module, "REQUIRES_FORMAT_V2", False):
        return 0
    get = getattr(module, "qzero_format", None)
    return 1 if get is None else int(get() == 1)


class AwqReader:
    """Reads WQLinear_GEMM and its kin: `qweight`, `qzeros` and `scales`, without `g_idx`."""

    name = "awq"

    def read(self, module: nn.Module) -> Reading:
        """The packed weight, or why it has none that can be read."""
        own = _container(module)
        if own is None or "g_idx" in _registered(module):
            return None
        bits = getattr(module, "w_bit", getattr(module, "bits", None))
        if bits != 4 or own["qweight"].dtype != torch.int32:
            return f"codes of {bits} bits in {own['qweight'].dtype}: only 4 bits in int32 are known"
        if own["qweight"].shape[1] * (_WORD // bits) != own["scales"].shape[1]:
            return "its codes are not packed along the outputs (GEMV or Marlin layout): load the GEMM version"
        return _packed(module, self.name, own, partial(_awq, bits), bits)


def _registered(module: nn.Module) -> dict[str, Tensor]:
    own = {**vars(module)["_parameters"], **vars(module)["_buffers"]}
    return {name: tensor for name, tensor in own.items() if isinstance(tensor, Tensor)}


def _container(module: nn.Module, *more: str) -> dict[str, Tensor] | None:
    own = _registered(module)
    names = ("qweight", "qzeros", "scales", *more)
    return {name: own[name] for name in names} if all(name in own for name in names) else None


def _packed(module: nn.Module, backend: str, tensors: dict[str, Tensor], rebuild: Any, bits: int) -> PackedWeight:
    groups, d_out = tensors["scales"].shape
    d_in = tensors["g_idx"].numel() if "g_idx" in tensors else tensors["qweight"].shape[0]
    # What unpacking needs and kernels cache (`wf_unsqueeze_zero`) belongs to the container too.
    beside = {name: one for name, one in _registered(module).items() if name.startswith("wf")}
    held = {**tensors, **beside}
    group_size = -(-d_in // groups)
    return PackedWeight(
        name="weight",
        backend=backend,
        d_out=int(d_out),
        d_in=int(d_in),
        dtype=tensors["scales"].dtype,
        registered=tuple(held),
        tensors=held,
        dequantize=partial(rebuild, held),
        bits=bits,
        group_size=None if group_size == d_in else group_size,
        rebuild=rebuild,
    )


def _unpacked(words: Tensor, bits: int, dim: int) -> Tensor:
    """Codes of a word side by side along a dimension, the lowest bits first."""
    shifts = torch.arange(0, _WORD, bits, device=words.device, dtype=torch.int32)
    codes = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.transpose(1, 2).flatten(0, 1) if dim == 0 else codes.flatten(1)


def _gptq(bits: int, offset: int, tensors: Mapping[str, Tensor]) -> Tensor:
    scales, groups = tensors["scales"].detach(), tensors["g_idx"].long()
    codes, zeros = _unpacked(tensors["qweight"], bits, 0), _unpacked(tensors["qzeros"], bits, 1)
    zeros = (zeros + offset) & (2**bits - 1) if offset else zeros
    return (scales[groups] * (codes - zeros[groups]).to(scales.dtype)).T.contiguous()


def _awq(bits: int, tensors: Mapping[str, Tensor]) -> Tensor:
    scales = tensors["scales"].detach()
    codes, zeros = (_in_order(_unpacked(tensors[name], bits, 1)) for name in ("qweight", "qzeros"))
    groups = torch.arange(codes.shape[0], device=codes.device) // (codes.shape[0] // scales.shape[0])
    return (scales[groups] * (codes - zeros[groups]).to(scales.dtype)).T.contiguous()


def _in_order(codes: Tensor) -> Tensor:
    """Undo the interleaving of outputs within a word."""
    words = codes.view(codes.shape[0], -1, len(_AWQ_ORDER))
    fresh = torch.empty_like(words)
    fresh[..., list(_AWQ_ORDER)] = words
    return fresh.flatten(1)
