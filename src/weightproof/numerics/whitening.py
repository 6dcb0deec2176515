"""Biwhitening: row and column scales that give a matrix unit variance everywhere.

Weight matrices have rows and columns of different size, and one global noise scale then reports
hundreds of false spikes. Sinkhorn iteration on the squared entries finds r and c such that
diag(r) W diag(c) has mean square 1 in every row and column (Landa, Zhang and Kluger 2022).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from weightproof.numerics.matrices import SAFE_MAGNITUDE, check_finite, row_chunks, row_major, working_dtype

SINKHORN_PASSES = 5

# Rows and columns with less than this share of the mean energy count as zero.
DEAD_ENERGY = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class Whitening:
    """Whitened = W * row_scale[:, None] * col_scale[None, :]; float64 on the CPU.

    `live_shape` is the shape without zero rows and columns. A zero row has the
    median scale, so that a later change of it is not multiplied by zero.
    """

    row_scale: torch.Tensor
    col_scale: torch.Tensor
    live_shape: tuple[int, int]


def live_shape(matrix: torch.Tensor) -> tuple[int, int]:
    """Numbers of rows and columns that are not all zero."""
    stored, turned = row_major(matrix)
    rows = torch.zeros(stored.shape[0], dtype=torch.bool, device=stored.device)
    cols = torch.zeros(stored.shape[1], dtype=torch.bool, device=stored.device)
    for part in row_chunks(*stored.shape):
        used = stored[part] != 0
        rows[part] = used.any(1)
        cols |= used.any(0)
    shape = int(rows.sum()), int(cols.sum())
    return (shape[1], shape[0]) if turned else shape


def biwhiten(matrix: torch.Tensor, *, magnitude: float, name: str = "") -> Whitening:
    """Scales of `SINKHORN_PASSES` Sinkhorn passes over W * W, each one chunked read.

    Args:
        matrix: (d_out, d_in) floating point tensor that is not all zero.
        magnitude: max |w_ij|, by which entries are divided when their squares are out of range.
        name: Used in errors.

    Raises:
        InputError: NaN or inf in the matrix.
    """
    check_finite(magnitude, name)
    stored, turned = row_major(matrix)
    factor = 1.0 if SAFE_MAGNITUDE[0] < magnitude < SAFE_MAGNITUDE[1] else 1.0 / magnitude
    row_weight = torch.ones(stored.shape[0], dtype=torch.float64, device=stored.device)
    col_weight = torch.ones(stored.shape[1], dtype=torch.float64, device=stored.device)
    for _ in range(SINKHORN_PASSES):
        row_weight, col_weight = _sinkhorn_pass(stored, col_weight, factor)
    # Split the common factor evenly: neither side then over- or underflows for extreme weights.
    rows, cols = row_weight.sqrt().cpu() * factor**0.5, col_weight.sqrt().cpu() * factor**0.5
    balance = float((_live_median(cols) / _live_median(rows)).sqrt())
    rows, live_rows = _fill_dead(rows * balance)
    cols, live_cols = _fill_dead(cols / balance)
    if turned:
        return Whitening(cols, rows, (live_cols, live_rows))
    return Whitening(rows, cols, (live_rows, live_cols))


def _sinkhorn_pass(stored: torch.Tensor, col_weight: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Row weights that fit `col_weight`, then column weights that fit these, in one read."""
    dtype = working_dtype(stored)
    height, width = stored.shape
    weight = col_weight.to(dtype)
    energy_target = float((col_weight > 0).sum())
    row_weight = torch.empty(height, dtype=torch.float64, device=stored.device)
    col_energy = torch.zeros(width, dtype=torch.float64, device=stored.device)
    floor = 0.0
    for part in row_chunks(height, width):
        chunk = stored[part].to(dtype)
        squares = torch.mul(chunk, chunk) if factor == 1.0 else (chunk * factor).square_()
        energy = torch.mv(squares, weight).double()
        floor = max(floor, DEAD_ENERGY * float(energy.mean()))
        row_weight[part] = torch.where(energy > floor, energy_target / energy, 0.0)
        col_energy += torch.mv(squares.t(), row_weight[part].to(dtype))
    live_rows = float((row_weight > 0).sum())
    alive = col_energy > DEAD_ENERGY * col_energy.mean()
    return row_weight, torch.where(alive, live_rows / col_energy, 0.0)


def _live_median(scale: torch.Tensor) -> torch.Tensor:
    return scale[scale > 0].median()


def _fill_dead(scale: torch.Tensor) -> tuple[torch.Tensor, int]:
    live = scale > 0
    return torch.where(live, scale, scale[live].median()), int(live.sum())
