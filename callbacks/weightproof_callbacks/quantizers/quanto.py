"""optimum-quanto: a QLinear whose frozen weight is a tensor subclass (WeightQBytesTensor, WeightQBitsTensor)."""

from __future__ import annotations

from typing import Any

from torch import nn

from weightproof.folders.readers import Reading
from weightproof_callbacks.quantizers.subclasses import comes_from, parameter, subclass_weight


class QuantoReader:
    """Reads what `optimum.quanto.quantize` and `freeze` made of a layer."""

    name = "quanto"

    def read(self, module: nn.Module) -> Reading:
        """The packed weight, or why it has none that can be read."""
        weight = parameter(module)
        if weight is None or not comes_from(module, "optimum.quanto"):
            return None
        if not comes_from(weight, "optimum.quanto"):
            qtype = getattr(module, "weight_qtype", None)
            # Unfrozen, the forward pass rounds the plain weight anew each time.
            return None if qtype is None else "it is not frozen: call optimum.quanto.freeze(model)"
        if weight.ndim != 2:
            return f"a {type(weight).__name__} of {weight.ndim} dimensions is no single linear map"
        return subclass_weight(weight, self.name, beside=_scales(module), bits=_bits(weight), group_size=_group(weight))


def _scales(module: Any) -> dict[str, Any]:
    """Scales of activations, which quanto registers beside the weight."""
    buffers = vars(module)["_buffers"]
    return {name: buffers[name] for name in ("input_scale", "output_scale") if buffers.get(name) is not None}


def _bits(weight: Any) -> int | None:
    return getattr(getattr(weight, "_qtype", None), "bits", None)


def _group(weight: Any) -> int | None:
    size = getattr(weight, "_group_size", None)
    return size if isinstance(size, int) and 0 < size < weight.shape[-1] else None
