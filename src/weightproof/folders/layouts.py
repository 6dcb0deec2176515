"""How a stored tensor becomes weight matrices oriented (d_out, d_in), and which ones are refused.

Pure functions of names, shapes and classes, shared by the two readers (a model in memory, a
checkpoint on disk). Everything with two or more dimensions is enumerated:

- a linear map or embedding table is one matrix; a fused map (GPT-2 `c_attn` with q, k and v, an
  expert's `gate_up_proj`) stays one matrix, as stored;
- GPT-2's Conv1D is stored (d_in, d_out) and is turned here, and nowhere else;
- a convolution is (out, in / groups * kernel positions), a transposed one (out * positions, in);
- a stack of experts (E, out, in) is one matrix per expert, named `...down_proj[3]`;
- what is not a linear map is enumerated once with the reason why it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import torch
from torch import Tensor

from weightproof.families import family_of


class Layout(StrEnum):
    """How the dimensions of a stored tensor are meant."""

    LINEAR = "(out, in)"
    TURNED = "(in, out)"
    CONVOLUTION = "(out, in, *kernel)"
    TRANSPOSED_CONVOLUTION = "(in, out, *kernel)"
    STACK = "(stack, out, in)"
    TURNED_STACK = "(stack, in, out)"
    TABLE = "(..., width)"


@dataclass(frozen=True, slots=True)
class Stored:
    """A stored tensor: public name, shape, owner's class, layout, and a refusal known beforehand."""

    name: str
    shape: tuple[int, ...]
    layout: Layout
    module_class: str = ""
    refusal: str | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """One matrix of a stored tensor; `select` turns a tensor of the stored layout into it."""

    name: str
    family: str
    d_out: int
    d_in: int
    select: Callable[[Tensor], Tensor]
    refusal: str | None


# ---------------------------------------------------------------- refusals

_REFUSED_NAMES = (
    (
        re.compile(r"(?:.*\.)?(?:\w+_)?rel(?:ative)?_(?:attention_|position_|pos_)?(?:bias\w*|h|w|table)(?:\.weight)?"),
        "a relative position table added to attention scores, not a linear map",
    ),
    (
        re.compile(r"(?:.*\.)?(?:\w+_)?scales?(?:_inv)?"),
        "a table of scales (of a quantised weight, for example), not a linear map",
    ),
    (re.compile(r"(?:.*\.)?A_log"), "state-space decay rates applied elementwise, not a linear map"),
    (re.compile(r"(?:.*\.)?(?:\w+_)?bias(?:es)?"), "a table of biases that are added, not a linear map"),
    (
        re.compile(r"(?:.*\.)?\w*norm\d*\.weight", re.IGNORECASE),
        "a normalisation gain applied elementwise, not a linear map",
    ),
    (
        re.compile(r"(?:.*\.)?parametrizations\..*|(?:.*\.)?weight_(?:orig|[gv])"),
        "stored under a parametrization or pruning mask, not the weight in use: remove the parametrization first",
    ),
)
_LEARNED_TABLE = "a learned token or position table added to activations, not a linear map"
DEPTHWISE = "a depthwise convolution: each row filters its own channel, together they are not one linear map"
_UNKNOWN_SHAPE = "a parameter of four or more dimensions outside a convolution: its meaning is unknown"


def _refusal(stored: Stored) -> str | None:
    if stored.refusal is not None:
        return stored.refusal
    for pattern, reason in _REFUSED_NAMES:
        if pattern.fullmatch(stored.name):
            return reason
    if stored.layout is Layout.TABLE:
        return _LEARNED_TABLE if len(stored.shape) == 3 else _UNKNOWN_SHAPE
    return None


# ---------------------------------------------------------------- orientation (views of the stored tensor)


def _as_stored(tensor: Tensor) -> Tensor:
    return tensor


def _turned(tensor: Tensor) -> Tensor:
    return tensor.T


def _flat_rows(tensor: Tensor) -> Tensor:
    """(out, in, *kernel) -> (out, in * positions); positions come first in a channels-last tensor."""
    if tensor.is_contiguous():
        return tensor.flatten(1)
    order = sorted(range(1, tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(0, *order).flatten(1)


def _flat_rows_turned(tensor: Tensor) -> Tensor:
    return _flat_rows(tensor).T


def _flat_table(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, -2)


def _item(index: int, turned: bool, tensor: Tensor) -> Tensor:
    return tensor[index].T if turned else tensor[index]


def _whole(stored: Stored) -> tuple[int, int, Callable[[Tensor], Tensor]]:
    shape = stored.shape
    rest = torch.Size(shape[1:]).numel()
    if stored.layout is Layout.TURNED:
        return shape[1], shape[0], _turned
    if stored.layout is Layout.CONVOLUTION:
        return shape[0], rest, _flat_rows
    if stored.layout is Layout.TRANSPOSED_CONVOLUTION:
        return rest, shape[0], _flat_rows_turned
    if stored.layout is Layout.TABLE:
        return torch.Size(shape[:-1]).numel(), shape[-1], _flat_table
    return shape[0], shape[1], _as_stored


def unreadable_dtype(dtype: torch.dtype) -> str | None:
    """Why values of this dtype are not the weights themselves; None for 16-bit floats and wider."""
    if dtype.is_floating_point and dtype.itemsize > 1:
        return None
    return f"it is stored as {str(dtype).removeprefix('torch.')}, packed or quantised: dequantise it to measure it"


def pieces(stored: Stored) -> Iterator[Piece]:
    """The matrices of one stored tensor of two or more dimensions, in order of the stack."""
    family = family_of(stored.name, stored.module_class)
    refusal = _refusal(stored)
    if stored.layout in (Layout.STACK, Layout.TURNED_STACK):
        turned = stored.layout is Layout.TURNED_STACK
        d_out, d_in = stored.shape[:0:-1] if turned else stored.shape[1:]
        for index in range(stored.shape[0]):
            yield Piece(f"{stored.name}[{index}]", family, d_out, d_in, partial(_item, index, turned), refusal)
        return
    d_out, d_in, select = _whole(stored)
    if 0 in (d_out, d_in):
        refusal = refusal or "it has no elements"
    yield Piece(stored.name, family, d_out, d_in, select, refusal)


def parameter_layout(shape: tuple[int, ...], module_class: str, *, turned_linear: bool, turned_stack: bool) -> Layout:
    """Layout of a parameter from the class of its module, never from a comparison of sizes.

    A 3-D parameter outside a convolution is a stack of linear maps (out, in), unless its leading
    dimension is 1 (`cls_token`, `position_embeddings`): such a table is not a map.
    """
    if re.fullmatch(r"(?:Lazy)?ConvTranspose[123]d", module_class):
        return Layout.TRANSPOSED_CONVOLUTION
    if re.fullmatch(r"(?:Lazy)?Conv[123]d", module_class):
        return Layout.CONVOLUTION
    if len(shape) == 2:
        return Layout.TURNED if turned_linear else Layout.LINEAR
    if len(shape) == 3 and shape[0] > 1 and module_class != "ParametrizationList":
        return Layout.TURNED_STACK if turned_stack else Layout.STACK
    return Layout.TABLE
