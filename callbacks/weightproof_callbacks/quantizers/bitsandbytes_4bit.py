"""bitsandbytes, 4 bits: a Params4bit of packed codes, with their scales in an object of its own, `quant_state`.

Where the CPU has dot products of bfloat16, the first forward pass in eval mode arranges the codes anew and rounds the
scales to bfloat16 (`packing_format_for_cpu`). `dequantize_4bit` of bitsandbytes does not know that layout: it is
unpacked here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from weightproof.folders.readers import PackedWeight, Reading, plain_copy
from weightproof_callbacks.quantizers.packages import missing
from weightproof_callbacks.quantizers.subclasses import parameter

_STATE = ("absmax", "code", "offset")
# Rows whose codes lie side by side in the layout for the CPU.
_CPU_ROWS = 32


class Bitsandbytes4bitReader:
    """Reads Linear4bit, LinearNF4, LinearFP4 and Embedding4bit of bitsandbytes."""

    name = "bitsandbytes-4bit"

    def read(self, module: nn.Module) -> Reading:
        """The packed weight, or why it has none that can be read."""
        weight = parameter(module)
        if type(weight).__name__ != "Params4bit":
            return None
        state = weight.quant_state
        if state is None:
            return "its values are not quantised yet: move the module to a device first (model.to('cpu'))"
        if reason := missing("bitsandbytes"):
            return reason
        if len(state.shape) != 2:
            return f"its quant_state describes {list(state.shape)}, which is no single linear map"
        inner = state.state2 if state.nested else None
        return PackedWeight(
            name="weight",
            backend=self.name,
            d_out=int(state.shape[0]),
            d_in=int(state.shape[1]),
            dtype=state.dtype,
            registered=("weight",),
            tensors={"weight": weight, **_held(state, "weight."), **_held(inner, "weight.nested_")},
            dequantize=partial(_dequantized, state, weight),
            bits=4,
            group_size=int(state.blocksize),
            rebuild=partial(_rebuilt, state),
            owners=(state,) if inner is None else (state, inner),
        )


def _held(state: Any, prefix: str) -> dict[str, Tensor]:
    return {
        f"{prefix}{name}": getattr(state, name) for name in _STATE if isinstance(getattr(state, name, None), Tensor)
    }


def _dequantized(state: Any, codes: Tensor) -> Tensor:
    if getattr(state, "packing_format_for_cpu", False):
        return _from_cpu_layout(state, codes)
    import bitsandbytes.functional  # pyright: ignore[reportMissingImports] - the module that is read comes from it

    return plain_copy(bitsandbytes.functional.dequantize_4bit(codes.detach(), state), state.dtype)


def _from_cpu_layout(state: Any, packed: Tensor) -> Tensor:
    """code[index] * absmax: 64 indices are 32 bytes, the low halves first, of 32 rows times two columns."""
    d_out, d_in = state.shape
    lines = packed.detach().reshape(-1, _CPU_ROWS)
    indices = torch.cat([lines & 0xF, lines >> 4], dim=1).view(d_out // _CPU_ROWS, d_in // 2, _CPU_ROWS, 2)
    indices = indices.transpose(1, 2).reshape(d_out, d_in)
    scales = state.absmax.detach().float().T.repeat_interleave(state.blocksize, dim=1)
    return (state.code.detach().float()[indices.long()] * scales).to(state.dtype)


def _rebuilt(state: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    return _dequantized(_refilled(state, tensors), tensors["weight"])


def _refilled(state: Any, tensors: Mapping[str, Tensor]) -> Any:
    """A quant_state with other tensors."""
    fresh = copy.copy(state)
    vars(fresh).update(_of_state(tensors, "weight."))
    if fresh.nested:
        fresh.state2 = copy.copy(state.state2)
        vars(fresh.state2).update(_of_state(tensors, "weight.nested_"))
    return fresh


def _of_state(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: tensors[f"{prefix}{name}"] for name in _STATE if f"{prefix}{name}" in tensors}
