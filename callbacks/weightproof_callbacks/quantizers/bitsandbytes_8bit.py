"""bitsandbytes, 8 bits: an Int8Params of codes with one scale a row, SCB, which moves at the first forward pass.

Before it the scale is `weight.SCB`; after it `weight.SCB` is None and the scale is `module.state.SCB`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weightproof.folders.readers import PackedWeight, Reading
from weightproof_callbacks.quantizers.subclasses import parameter


class Bitsandbytes8bitReader:
    """Reads Linear8bitLt and Embedding8bit of bitsandbytes."""

    name = "bitsandbytes-8bit"

    def read(self, module: nn.Module) -> Reading:
        """The packed weight, or why it has none that can be read."""
        weight = parameter(module)
        if type(weight).__name__ != "Int8Params":
            return None
        state = getattr(module, "state", None)
        scale = getattr(state, "SCB", None)
        scale = weight.SCB if scale is None else scale
        if weight.dtype != torch.int8 or scale is None:
            if getattr(weight, "has_fp16_weights", False):
                return "it keeps 16-bit weights and rounds them in every forward pass (has_fp16_weights=True)"
            return "its values are not quantised yet: move the module to a device first (model.to('cpu'))"
        tensors: dict[str, Tensor] = {"weight": weight, "weight.SCB": scale}
        return PackedWeight(
            name="weight",
            backend=self.name,
            d_out=int(weight.shape[0]),
            d_in=int(weight.shape[1]),
            dtype=torch.float32,
            registered=("weight",),
            tensors=tensors,
            dequantize=lambda: _dequantized(tensors),
            bits=8,
            steps=lambda: scale.detach().float().view(-1, 1) / 127.0,
            rebuild=_dequantized,
            owners=_owners(state),
        )


def _owners(state: Any) -> tuple[object, ...]:
    return () if state is None else (state,)


def _dequantized(tensors: Mapping[str, Tensor]) -> Tensor:
    """Codes * SCB / 127: the row's largest magnitude has the code 127."""
    return tensors["weight"].detach().float() * (tensors["weight.SCB"].detach().float().view(-1, 1) / 127.0)
