"""torch.ao dynamic quantization: `weight` is a method, the codes are in an object of C++ that cannot be written to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weightproof.folders.readers import PackedWeight, Reading


class TorchDynamicReader:
    """Reads the linear layers that `torch.ao.quantization.quantize_dynamic` (and its static kin) put in."""

    name = "torch-dynamic"

    def read(self, module: nn.Module) -> Reading:
        """The packed weight, or why it has none that can be read."""
        kind = type(module)
        inside = kind.__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized"))
        if not inside or kind.__name__ == "LinearPackedParams":
            return None
        found: Any = module
        holder = vars(module)["_modules"].get("_packed_params")
        if holder is None or not callable(getattr(found, "weight", None)):
            return None if not _has_codes(module) else f"{kind.__name__} is not a linear layer: only those can be read"
        tensors = _unpacked(found)
        weight = tensors["weight.int_repr" if "weight.int_repr" in tensors else "weight.half"]
        return PackedWeight(
            name="weight",
            backend=self.name,
            d_out=int(weight.shape[0]),
            d_in=int(weight.shape[1]),
            dtype=torch.float32,
            registered=(),
            tensors=tensors,
            dequantize=lambda: _dequantized(_unpacked(found)),
            bits=8 if "weight.int_repr" in tensors else 16,
            rebuild=_dequantized,
            owners=(holder,),
            opaque=True,
        )


def _has_codes(module: nn.Module) -> bool:
    return any(type(value).__name__ == "ScriptObject" for value in vars(module).values())


def _unpacked(module: Any) -> dict[str, Tensor]:
    """Copies of what is packed: codes, scales and zero points by row or for the whole, bias."""
    weight, bias = module.weight(), module.bias()
    found: dict[str, Tensor] = {}
    if not weight.is_quantized:
        found["weight.half"] = weight.detach()
    elif weight.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams):
        found["weight.int_repr"] = weight.int_repr()
        found["weight.scale"] = weight.q_per_channel_scales()
        found["weight.zero_point"] = weight.q_per_channel_zero_points()
    else:
        found["weight.int_repr"] = weight.int_repr()
        found["weight.scale"] = torch.tensor(weight.q_scale(), dtype=torch.float64)
        found["weight.zero_point"] = torch.tensor(weight.q_zero_point())
    if bias is not None:
        found["bias"] = bias.detach()
    return found


def _dequantized(tensors: Mapping[str, Tensor]) -> Tensor:
    """(codes - zero point) * scale, in float32 as the kernels have it."""
    if "weight.half" in tensors:
        return tensors["weight.half"].float()
    scale, zero = tensors["weight.scale"].float(), tensors["weight.zero_point"]
    if scale.ndim:
        scale, zero = scale.view(-1, 1), zero.view(-1, 1)
    return (tensors["weight.int_repr"].float() - zero.float()) * scale
