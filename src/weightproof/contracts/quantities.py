"""The numbers behind the contracts of `weightproof.kinds`: pure functions of two matrices.

Both are read in chunks of rows, in a dtype that holds their values exactly; beside them a few MiB
are needed. A ratio with nothing in it is 0; one that is undefined is inf.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

# 256 to 512 KiB per temporary: a handful of them stay in the second-level cache.
_CHUNK_ELEMENTS = 1 << 16
# w / Delta and q * Delta are computed in float32 by the quantizer: two roundings of at most 2^-23 |w|.
_LEVEL_ROUNDING = 2.0**-22
# A tensor with more distinct values than this is not quantized in any sense; counting stops here.
_MAX_LEVELS = 1 << 17
_EXPONENTS = {torch.float32: (torch.int32, 0xFF << 23), torch.float64: (torch.int64, 0x7FF << 52)}


class Grid(NamedTuple):
    """A quantization grid: width and what shares one scale (see `kinds.Quantize`)."""

    bits: int
    granularity: str
    group_size: int | None


def quantization_statistics(grid: Grid, before: torch.Tensor, after: torch.Tensor) -> dict[str, float]:
    """The four statistics of `kinds.Quantize` in one pass over chunks of rows (two reads for "tensor")."""
    top = 2 ** (grid.bits - 1) - 1
    rounding, smallest = _storage_rounding(after.dtype)
    rounding += _LEVEL_ROUNDING
    whole = _max_abs(before) if grid.granularity == "tensor" else None
    levels = after.new_empty(0, dtype=_working_dtype(before, after))
    most_levels, worst_row, flipped = 0, 0.0, 0
    error_square = weight_square = 0.0
    for old, new in chunks(before, after, _working_dtype(before, after)):
        size = old.abs()
        half_step = _peaks(size, grid, whole) / (2 * top)
        # min(|w|, Delta / 2), and the rounding of the stored level, which is at most |w| plus that.
        bound = torch.minimum(size, half_step).mul_(1 + rounding).add_(size, alpha=rounding).add_(smallest)
        row_error, row_bound = _row_norms(new - old), _row_norms(bound)
        worst_row = max(worst_row, _max_ratio(row_error, row_bound))
        product = old * new
        if not bool(product.amin() >= 0):
            flipped += int(((product < 0) & (size > half_step * (1 + 1e-6))).sum())
        error_square += float(row_error.square().sum())
        weight_square += float(_row_norms(old).square().sum())
        if whole is None:
            most_levels = max(most_levels, levels_per_group(new, grid.group_size))
        elif len(levels) < _MAX_LEVELS:
            levels = distinct(torch.cat([levels.to(new.device), new.flatten()]))
            most_levels = len(levels)
    return {
        "levels_per_group": float(most_levels),
        "error_over_half_step": worst_row,
        "relative_error": math.sqrt(ratio(error_square, weight_square)),
        "sign_flip_fraction": flipped / max(1, before.numel()),
    }


def cast_error(dtype: torch.dtype, before: torch.Tensor, after: torch.Tensor) -> float:
    """Largest |w' - w| in units of half an ulp of `dtype` at w."""
    worst = 0.0
    for old, new in chunks(before, after, _working_dtype(before, after)):
        same = (old == new) | (old.isnan() & new.isnan())
        error = torch.where(same, 0.0, (new - old).abs() / half_ulp(old.abs(), dtype))
        worst = max(worst, float(error.nan_to_num(nan=math.inf, posinf=math.inf).max()))
    return worst


def count_altered(before: torch.Tensor, after: torch.Tensor) -> tuple[int, int, int]:
    """How many elements differ (NaN differs); differ and are not zero; and are not zero."""
    differ = altered = nonzero = 0
    for old, new in chunks(before, after, _working_dtype(before, after)):
        changed, kept = new != old, new != 0
        differ += int(changed.sum())
        altered += int((changed & kept).sum())
        nonzero += int(kept.sum())
    return differ, altered, nonzero


def relative_change(before: torch.Tensor, after: torch.Tensor) -> float | None:
    """||after - before||_F / ||before||_F, summed in float64; None when `before` is all zero."""
    change = size = 0.0
    for old, new in chunks(before, after, _working_dtype(before, after)):
        change += float(_row_norms(new - old).square().sum())
        size += float(_row_norms(old).square().sum())
    return math.sqrt(change / size) if size else None


def chunks(
    before: torch.Tensor, after: torch.Tensor, dtype: torch.dtype = torch.float64
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Chunks of rows of two tensors of equal shape, in `dtype` on the device of the first."""
    if before.numel() == 0:
        return
    rows = before.shape[0] if before.ndim > 1 else 1
    old, new = before.detach().reshape(rows, -1), after.detach().reshape(rows, -1)
    step = max(1, _CHUNK_ELEMENTS // max(1, old.shape[1]))
    for start in range(0, rows, step):
        part = old[start : start + step].to(dtype)
        yield part, new[start : start + step].to(part.device).to(dtype)


def incomparable(before: torch.Tensor, after: torch.Tensor) -> str | None:
    """Why two tensors cannot be compared element by element, or None."""
    if before.shape != after.shape:
        return f"the shape changed from {list(before.shape)} to {list(after.shape)}"
    for tensor in (before, after):
        if not tensor.is_floating_point():
            return f"stored as {str(tensor.dtype).removeprefix('torch.')}, which holds codes, not weights"
    return None


def _working_dtype(before: torch.Tensor, after: torch.Tensor) -> torch.dtype:
    """float32, which holds every smaller dtype exactly; float64 when one of the two is stored so."""
    return torch.float64 if torch.float64 in (before.dtype, after.dtype) else torch.float32


def _row_norms(rows: torch.Tensor) -> torch.Tensor:
    """||row||_2 of each row, squared and summed in float64: no overflow, no lost small rows."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)


def _peaks(size: torch.Tensor, grid: Grid, whole: float | None) -> torch.Tensor:
    """Largest magnitude in the scale group of each element: (rows, 1), or (rows, d_in) for groups."""
    if whole is not None:
        return size.new_full((size.shape[0], 1), whole)
    if grid.group_size is None:
        return size.amax(1, keepdim=True)
    return torch.cat([part.amax(1, keepdim=True).expand_as(part) for part in size.split(grid.group_size, dim=1)], dim=1)


def levels_per_group(new: torch.Tensor, group_size: int | None) -> int:
    """Largest number of distinct values in one group; 0.0 and -0.0 are one value, NaNs are many."""
    d_in = new.shape[1]
    width = d_in if group_size is None else min(group_size, d_in)
    edge = d_in - d_in % width
    parts = (new[:, :edge].reshape(-1, width), new[:, edge:])
    return max((most_distinct(part) for part in parts if part.numel()), default=0)


def most_distinct(rows: torch.Tensor) -> int:
    """Largest number of distinct values in a row; (rows, width), both at least 1."""
    if rows.device.type != "cpu":
        return most_distinct_on_device(rows)
    ordered = np.sort(rows.numpy(), axis=1)  # vectorised: some thirty times faster than torch.sort on a CPU
    return 1 + int((ordered[:, 1:] != ordered[:, :-1]).sum(axis=1).max(initial=0))


def most_distinct_on_device(rows: torch.Tensor) -> int:
    """The same where the rows lie: one number leaves the device."""
    ordered = rows.sort(dim=1).values
    return 1 + int((ordered[:, 1:] != ordered[:, :-1]).sum(dim=1).amax())


def distinct(values: torch.Tensor) -> torch.Tensor:
    """The distinct values, ascending, on their device; 0.0 and -0.0 are one value, NaNs are many."""
    if values.device.type != "cpu":
        return values.unique()
    return torch.from_numpy(np.unique(values.numpy(), equal_nan=False))


def half_ulp(size: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half the spacing of `dtype` at each |w|, never less than half its smallest subnormal.

    The exponent bits of a float32 or float64 number, alone, are the power of two below it (0 for a
    subnormal, inf for inf and NaN).
    """
    facts = torch.finfo(dtype)
    integer, exponent_bits = _EXPONENTS[size.dtype]
    power = (size.view(integer) & exponent_bits).view(size.dtype)
    return (power * (facts.eps / 2)).clamp_(min=facts.smallest_normal * facts.eps / 2)


def _storage_rounding(dtype: torch.dtype) -> tuple[float, float]:
    """Unit roundoff of a storage dtype, and half its smallest subnormal."""
    facts = torch.finfo(dtype)
    return facts.eps / 2, facts.smallest_normal * facts.eps / 2


def _max_abs(tensor: torch.Tensor) -> float:
    return float(torch.stack(torch.aminmax(tensor.detach())).abs().max()) if tensor.numel() else 0.0


def _max_ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> float:
    """Largest quotient; NaN counts as inf."""
    quotient = torch.where(numerator == 0, 0.0, numerator / denominator)
    return float(quotient.nan_to_num(nan=math.inf, posinf=math.inf).max())


def ratio(numerator: float, denominator: float) -> float:
    """The quotient; 0 where there is nothing to divide, inf where it is undefined."""
    if numerator == 0.0:
        return 0.0
    quotient = numerator / denominator if denominator else math.inf
    return math.inf if math.isnan(quotient) else quotient
