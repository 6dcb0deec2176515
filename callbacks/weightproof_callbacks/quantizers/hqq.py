"""HQQ: an HQQLinear has no `weight`, but codes W_q and a dictionary `meta` with scales, zero points and the shape."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from weightproof.folders.readers import PackedWeight, Reading, plain_copy
from weightproof_callbacks.quantizers.packages import missing


class HqqReader:
    """Reads HQQLinear."""

    name = "hqq"

    def read(self, module: nn.Module) -> Reading:
        """The packed weight, or why it has none that can be read."""
        if type(module).__name__ != "HQQLinear":
            return None
        found: Any = module
        if not getattr(found, "ready", False) or not hasattr(found, "W_q"):
            return "it holds no codes yet (W_q): initialise it first"
        if reason := missing("hqq"):
            return reason
        meta = found.meta
        if any(meta.get(flag) for flag in ("quant_scale", "quant_zero")):
            return (
                "its scales are quantised themselves, which was never tested: use quant_scale=False, quant_zero=False"
            )
        d_out, d_in = (int(size) for size in meta["shape"])
        tensors = {"W_q": found.W_q, **_held(meta)}
        if isinstance(getattr(found, "bias", None), Tensor):
            tensors["bias"] = found.bias
        return PackedWeight(
            name="weight",
            backend=self.name,
            d_out=d_out,
            d_in=d_in,
            dtype=meta.get("compute_dtype", found.compute_dtype),
            registered=tuple(name for name in ("W_q", "bias") if name in vars(module)["_parameters"]),
            tensors=tensors,
            dequantize=partial(_dequantized, found),
            bits=int(meta["nbits"]),
            group_size=meta["group_size"],
            rebuild=partial(_rebuilt, found),
            owners=(meta,),
        )


def _held(meta: Mapping[str, Any]) -> dict[str, Tensor]:
    return {f"meta.{key}": value for key, value in sorted(meta.items()) if isinstance(value, Tensor)}


def _dequantized(module: Any) -> Tensor:
    return plain_copy(module.dequantize())


def _rebuilt(module: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    from hqq.core.quantize import Quantizer  # pyright: ignore[reportMissingImports] - the module comes from it

    meta = {key: tensors.get(f"meta.{key}", value) for key, value in module.meta.items()}
    return plain_copy(Quantizer.dequantize(tensors["W_q"], meta))
