"""torchao: the weight of an ordinary nn.Linear is a tensor subclass of torchao (Int8Tensor, Float8Tensor, ...)."""

from __future__ import annotations

from typing import Any

from torch import nn

from weightproof.folders.readers import Reading
from weightproof_callbacks.quantizers.subclasses import comes_from, parameter, subclass_weight

# Widths of the dtypes in which torchao names its codes.
_BITS = {f"int{bits}": bits for bits in range(1, 9)} | {f"uint{bits}": bits for bits in range(1, 9)}


class TorchaoReader:
    """Reads what `torchao.quantization.quantize_` made of a linear layer or an embedding."""

    name = "torchao"

    def read(self, module: nn.Module) -> Reading:
        """The packed weight, or why it has none that can be read."""
        weight = parameter(module)
        if weight is None or not comes_from(weight, "torchao"):
            return None
        if not hasattr(weight, "dequantize") or not hasattr(weight, "__tensor_flatten__"):
            return f"{type(weight).__name__} has no dequantize(), or does not say which tensors it is made of"
        if weight.ndim != 2:
            return f"{type(weight).__name__} of {weight.ndim} dimensions is no single linear map"
        return subclass_weight(weight, self.name, bits=_bits(weight), group_size=_group_size(weight))


def _bits(weight: Any) -> int | None:
    dtype = getattr(weight, "target_dtype", None)
    dtype = getattr(getattr(weight, "qdata", None), "dtype", None) if dtype is None else dtype
    return _BITS.get(str(dtype).removeprefix("torch."))


def _group_size(weight: Any) -> int | None:
    block = getattr(weight, "block_size", None)
    return int(block[-1]) if block and 0 < block[-1] < weight.shape[-1] else None
