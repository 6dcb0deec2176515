"""How a merge of a known delta went: how far W' - W is from it, and what it looks like where it is something else.

Pure functions of matrices. With E = W' - W and the declared delta D:

- error ||E - D||_F / ||D||_F, against what rounding can make of it;
- coefficient c = <E, D> / ||D||_F^2 and rest ||E - c D||_F / ||D||_F: a small rest says that c D was merged. c is 2
  for a delta merged twice, 0 for one that was not, -1 for the wrong sign, 10 for ten times its scaling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from weightproof.contracts.quantities import chunks, half_ulp, levels_per_group, ratio

# How close c must be to a whole number for it to be called one.
_WHOLE = 0.05
# A matrix of 4-bit storage has at most 16 values in each block of this many weights (bitsandbytes, QLoRA).
_BLOCK, _LEVELS = 64, 16


class Merge(NamedTuple):
    """How a merge went; each relative to the Frobenius norm of the declared delta.

    `error` and its `limit`; `coefficient` and `rest` of the best multiple of the delta; `size` is ||D||_F.
    """

    error: float
    limit: float
    coefficient: float
    rest: float
    size: float


def read_merge(before: Tensor, after: Tensor, delta: Tensor, roundings: int = 1) -> Merge:
    """Compare what changed with what should have.

    The limit is half an ulp of each merged element in the coarser of the two dtypes, once for each rounding that the
    merge makes of the whole matrix, plus that of the product B @ A when it was computed in the same dtype (8 units of
    roundoff are allowed).

    Args:
        before: W, (d_out, d_in).
        after: W'.
        delta: What should have been added.
        roundings: How often a correct merge rounds the whole matrix: once for LoRA; DoRA also rounds the sum, the
            lengths of the rows and their ratio to the magnitudes.
    """
    coarse = max((before.dtype, after.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    error = size = rounding = inner = moved = 0.0
    for (old, new), (grown, _) in zip(chunks(before, after), chunks(delta.to(before.device), delta), strict=True):
        change = new - old
        error += float((change - grown).square().sum())
        size += float(grown.square().sum())
        inner += float((change * grown).sum())
        moved += float(change.square().sum())
        rounding += float(half_ulp((old + grown).abs(), coarse).square().sum())
    if size == 0.0:
        return Merge(ratio(error, size), 0.0, 0.0, ratio(moved, size), 0.0)
    limit = 1.01 * roundings * math.sqrt(rounding / size) + 4 * torch.finfo(coarse).eps + 2.0**-20
    coefficient = inner / size
    rest = math.sqrt(max(0.0, moved - inner**2 / size) / size) if math.isfinite(moved) else math.inf
    return Merge(math.sqrt(ratio(error, size)), limit, coefficient, rest, math.sqrt(size))


def words_for(merge: Merge, before: Tensor, after: Tensor) -> str:
    """What a merge that broke its contract looks like, in words."""
    if merge.size == 0.0:
        return "the adapter's delta is zero here, yet the matrix changed"
    if not math.isfinite(merge.error):
        return "the merged matrix, or the delta, holds NaN or inf"
    identical = merge.coefficient == 0.0 and merge.rest == 0.0
    if is_stored_in_few_levels(before) and is_stored_in_few_levels(after):
        return _in_few_levels(merge, identical=identical)
    if identical:
        return "the delta was not merged: the matrix is byte-identical to the base"
    if merge.rest > max(merge.limit, abs(merge.coefficient - 1.0) / 2):
        return f"something else than this adapter's delta changed: {merge.rest:.3g} times its size"
    return _multiple(merge.coefficient)


def _in_few_levels(merge: Merge, *, identical: bool) -> str:
    advice = "merge into the unquantised base"
    if identical:
        why = "the matrix is byte-identical to the base, which is stored in 4 bits"
        return f"the delta was not merged, or lost in rounding: {why}; {advice}"
    return (
        f"the base is stored in 4 bits ({_LEVELS} values in {_BLOCK} weights at most): rounding to them is an error of "
        f"{merge.error:.3g} times the delta; {advice}"
    )


def _multiple(c: float) -> str:
    """What it means that c times the delta was merged."""
    if abs(c) < _WHOLE:
        return "the delta was not merged"
    whole = round(c) if abs(c - round(c)) <= _WHOLE * max(1.0, abs(c) / 4) else None
    if whole == 2:
        return "the delta was merged twice"
    if whole == -1:
        return "the delta was merged with the wrong sign"
    if c < 0:
        return f"the delta was merged with the wrong sign and {-c:.3g} times its scaling"
    if whole is not None and whole > 2:
        return f"the delta was merged {whole} times over, or with {whole} times its scaling"
    return f"the delta was merged with {c:.3g} times its scaling"


def guess(after: Tensor, candidates: Mapping[str, Callable[[], Tensor]], size: float, limit: float) -> str | None:
    """The name of the first wrong result that the merged matrix is, within rounding.

    For merges that are no addition (DoRA), where no multiple of one delta tells them apart.

    Args:
        after: W'.
        candidates: In words -> the matrix that this mistake makes.
        size: ||D||_F of the declared delta.
        limit: Largest distance, relative to `size`.
    """
    for words, make in candidates.items():
        square = sum(float((new - wrong).square().sum()) for new, wrong in chunks(after, make()))
        if math.sqrt(ratio(square, size**2)) <= limit:
            return words
    return None


def is_stored_in_few_levels(weight: Tensor) -> bool:
    """Whether no block of 64 consecutive inputs holds more than 16 values, as in 4-bit storage."""
    if weight.ndim != 2 or weight.shape[1] < _BLOCK or not weight.numel():
        return False
    blocks = weight.shape[1] - weight.shape[1] % _BLOCK
    return levels_per_group(weight[:, :blocks].detach().float(), _BLOCK) <= _LEVELS
