"""Edits of values, graded in strength: new values of a matrix from a draw. Pure; `judgement.plans` writes them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from weightproof.calibration.drawing import EditDraw
from weightproof.edits import RTN, SVD
from weightproof.types import WeightMatrix

FAMILIES = ("attn", "ffn", "expert")
_GROUP = 32


def block_of(name: str) -> str | None:
    """The block that a tensor lies in: its name up to and with the first number; None outside of blocks."""
    parts = name.split(".")
    index = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return None if index is None else ".".join(parts[: index + 1])


def is_chosen(drawn: EditDraw, matrix: WeightMatrix) -> bool:
    """Whether a draw changes a matrix: it can be written, is a linear map of a block, and lies in the drawn place."""
    if matrix.refusal is not None or not matrix.is_view or matrix.family not in FAMILIES:
        return False
    label, _, name = drawn.where.partition(" ")
    return label == "all" or (block_of(matrix.name) if label == "block" else matrix.family) == name


def value_plan(drawn: EditDraw) -> Callable[[WeightMatrix], torch.Tensor | None]:
    """What a draw makes of a matrix (d_out, d_in); None where it leaves it."""
    change = _CHANGES[drawn.kind]

    def plan(matrix: WeightMatrix) -> torch.Tensor | None:
        if not is_chosen(drawn, matrix) or matrix.d_out * matrix.d_in == 0:
            return None
        generator = torch.Generator().manual_seed(drawn.seed ^ zlib.crc32(matrix.name.encode()))
        return change(matrix, drawn.params, generator)

    return plan


_Params = Mapping[str, Any]


def _cast(matrix: WeightMatrix, params: _Params, generator: torch.Generator) -> torch.Tensor:
    weight = matrix.load()
    return weight.to(getattr(torch, params["dtype"])).to(weight.dtype)


def _rtn(matrix: WeightMatrix, params: _Params, generator: torch.Generator) -> torch.Tensor | None:
    size = _GROUP if params["granularity"] == "group" else None
    return RTN(bits=params["bits"], granularity=params["granularity"], group_size=size).plan(matrix)


def _noise(matrix: WeightMatrix, params: _Params, generator: torch.Generator) -> torch.Tensor:
    weight = matrix.load()
    noise = torch.randn(weight.shape, generator=generator).to(weight.device)
    size = float(weight.float().std()) if weight.numel() > 1 else float(weight.float().abs())
    return weight.float() + noise * (size * 10.0 ** (-params["decibels"] / 20.0))


def _prune(matrix: WeightMatrix, params: _Params, generator: torch.Generator) -> torch.Tensor:
    weight = matrix.load()
    sizes = weight.abs().flatten().float()
    count = math.ceil(params["sparsity"] * sizes.numel())
    return torch.where(weight.abs().float() <= sizes.kthvalue(count).values, torch.zeros_like(weight), weight)


def _svd(matrix: WeightMatrix, params: _Params, generator: torch.Generator) -> torch.Tensor | None:
    return SVD(energy=params["energy"]).plan(matrix)


def _scale(matrix: WeightMatrix, params: _Params, generator: torch.Generator) -> torch.Tensor:
    return matrix.load() * params["factor"]


_CHANGES: Mapping[str, Callable[[WeightMatrix, _Params, torch.Generator], torch.Tensor | None]] = {
    "cast": _cast,
    "rtn": _rtn,
    "noise": _noise,
    "prune": _prune,
    "svd": _svd,
    "scale": _scale,
}
