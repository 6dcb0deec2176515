"""The k-th smallest magnitude among many, exactly, by counting digits: memory for one chunk and one histogram.

The bits of a float that is not negative, read as a whole number, order as the float does. So the threshold is found
16 bits at a time: count the values by their next digit, go on inside the digit in which the k-th lies. Counts are
whole numbers, which add up over matrices and over processes; nothing is sorted and nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_DIGIT = 16
_BINS = 1 << _DIGIT
_CHUNK_ELEMENTS = 1 << 20

# (how far the digit lies from the right, all digits left of it) -> counts of each digit, (65536,) int64.
Counter = Callable[[int, int], Tensor]


def magnitude_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float32, which holds every smaller dtype exactly; float64 where a matrix is stored so."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def kth_smallest(k: int, dtype: torch.dtype, count: Counter) -> tuple[float, int]:
    """The k-th smallest magnitude (k from 1), and how many of the k equal it; the rest of them are smaller.

    NaN is left out. Where fewer than k values are left, the largest of them is given, with all that equal it.

    Args:
        k: Rank from 1.
        dtype: float32 or float64: in which the magnitudes are compared.
        count: Counts of one digit.
    """
    prefix, left = 0, k
    for shift in range(torch.finfo(dtype).bits - _DIGIT, -1, -_DIGIT):
        counts = count(shift, prefix)
        reached = counts.cumsum(0)
        left = min(left, int(reached[-1]))
        digit = int(torch.searchsorted(reached, left))
        left -= int(reached[digit - 1]) if digit else 0
        prefix = prefix << _DIGIT | digit
    bits = torch.tensor(prefix, dtype=torch.int64)
    whole = bits.view(torch.float64) if dtype == torch.float64 else bits.to(torch.int32).view(torch.float32)
    return float(whole), left


def digit_counts(values: Tensor, dtype: torch.dtype, shift: int, prefix: int) -> Tensor:
    """How many magnitudes have each digit, among those whose digits left of it are `prefix`; (65536,) int64 on the CPU.

    Args:
        values: Of any shape and floating dtype.
        dtype: As in `kth_smallest`.
        shift: How far the digit lies from the right, in bits.
        prefix: The bits left of it.
    """
    total = torch.zeros(_BINS, dtype=torch.int64)
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    infinity = int(torch.tensor(torch.inf, dtype=dtype).view(integer))
    rows = values.detach().reshape(-1) if values.is_contiguous() else values.detach()
    step = max(1, _CHUNK_ELEMENTS // max(1, rows[:1].numel()))
    for start in range(0, len(rows), step):
        bits = rows[start : start + step].to(dtype).abs().view(integer).reshape(-1)
        fits = bits <= infinity  # greater: NaN
        if shift + _DIGIT < torch.finfo(dtype).bits:
            fits &= (bits >> (shift + _DIGIT)) == prefix
        total += torch.bincount((bits[fits] >> shift) & (_BINS - 1), minlength=_BINS).cpu()
    return total


def dropped(values: Tensor, dtype: torch.dtype, threshold: float, num_ties: int) -> Tensor:
    """Which elements lie below a threshold, and the first `num_ties` of those that equal it, row by row; bool."""
    size = values.to(dtype).abs()
    below = size < threshold
    ties = (size == threshold).flatten().nonzero().flatten()[:num_ties]
    drop = below.flatten()
    drop[ties] = True
    return drop.view(values.shape)
