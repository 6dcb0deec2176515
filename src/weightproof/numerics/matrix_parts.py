"""What one process holds of a matrix that is cut over many, and what a single sum tells of the whole.

The sum takes the energies (sums of squares) of the rows and columns of a matrix, its largest entry,
and the squares of its change: with them every process knows the profile of the whole matrix and
the Frobenius norms of the change, plain and whitened.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from weightproof.collective import Processes
from weightproof.errors import InputError
from weightproof.numerics.lanczos import ROUNDING
from weightproof.numerics.matrices import row_major
from weightproof.numerics.norms import TINY_SQUARES, delta_dtype
from weightproof.numerics.sharded_lanczos import LocalMatrix, paired_chunks
from weightproof.parallel.placements import COLUMNS, ROWS
from weightproof.parallel.shards import Shard
from weightproof.spectrum import Energies, Profile, read_energies

# The sums behind the energies and the largest entries.
SUMS = ("number of NaN and inf", "squares of the change", "of the whitened change", "of the state before")


@dataclass(frozen=True, slots=True)
class Facts:
    """What one sum over the processes tells of a whole matrix.

    `change` and `whitened_change` are Frobenius norms, rounded up; None where there is none, or it
    is not finite. `relative_change` is None then too, and when the state before was all zero.
    """

    profile: Profile
    change: float | None
    whitened_change: float | None
    relative_change: float | None


class MatrixPart:
    """This process's part of one matrix, of its change, and of the scales of both sides.

    Args:
        name: Used in errors.
        now: The part that lies here, of a matrix cut by rows or columns.
        before: The same part of the state before, or None.
        scales: (d_out,) and (d_in,), whole; None for ones. They serve the change alone.
        processes: Those that hold the parts.

    Raises:
        InputError: cut otherwise, two states that do not lie alike, or scales of another length.
    """

    def __init__(
        self,
        name: str,
        now: Shard,
        before: Shard | None,
        scales: tuple[torch.Tensor | None, torch.Tensor | None],
        processes: Processes,
    ) -> None:
        self._cut_dim = cut_dim(now, name)
        if before is not None and _placed(before) != _placed(now):
            raise InputError(f"{name!r} lies as {_placed(before)} before and as {_placed(now)} now; cut both alike.")
        self.shape, self.leads = (now.shape[0], now.shape[1]), processes.rank == 0
        self._now, self._turned = now.local.detach(), now.turned
        self._before = None if before is None else before.local.detach()
        self._rank, self._size = processes.rank, processes.size
        self._span = slice(*now.ranges[processes.rank])
        self._scales = self._local_scales(name, scales)
        self._is_whitened = before is not None and any(scale is not None for scale in scales)

    def _local_scales(self, name: str, scales: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """The scales of the stored dimensions; of the one that is cut, this process's part."""
        stored = list(reversed(scales)) if self._turned else list(scales)
        for scale, side in zip(stored, self.shape, strict=True):
            if scale is not None and tuple(scale.shape) != (side,):
                raise InputError(f"a scale of {name!r} has shape {tuple(scale.shape)}; give ({side},).")
        cut = stored[self._cut_dim]
        stored[self._cut_dim] = None if cut is None else cut[self._span]
        return stored

    def matrix(self) -> LocalMatrix:
        """The part as an operator on vectors."""
        return LocalMatrix(self._now, cut_dim=self._cut_dim)

    def change(self) -> LocalMatrix:
        """The part of the change as an operator on vectors."""
        assert self._before is not None
        return LocalMatrix(self._now, self._before, cut_dim=self._cut_dim)

    def whitened_change(self) -> LocalMatrix:
        """The part of diag(row_scale) change diag(col_scale) as an operator on vectors."""
        assert self._before is not None
        cut, free = self._scales[self._cut_dim], self._scales[1 - self._cut_dim]
        return LocalMatrix(self._now, self._before, cut_dim=self._cut_dim, cut_scale=cut, free_scale=free)

    def readings(self) -> torch.Tensor:
        """(m + n + processes + 4,) float64, to be summed over the processes.

        Energies by row and by column as stored; the largest entry here, in a place of its own; `SUMS`.
        """
        sides = [np.zeros(side) for side in self.shape]
        largest, sums = np.zeros(self._size), np.zeros(len(SUMS))
        if self._now.numel():
            read = read_energies(self._now)
            for dim, energies in enumerate((read.rows, read.cols)):
                sides[dim][self._span if dim == self._cut_dim else slice(None)] = energies
            largest[self._rank], sums[0] = read.max_abs, read.num_nonfinite
            sums[1:] = self._squares()
        return torch.from_numpy(np.concatenate([*sides, largest, sums])).to(self._now.device)

    def _squares(self) -> tuple[float, float, float]:
        """Squares of this part of the change, of the whitened change, and of the state before."""
        if self._before is None:
            return 0.0, 0.0, 0.0
        now, turned = row_major(self._now)
        before, scales = (self._before.t(), self._scales[::-1]) if turned else (self._before, self._scales)
        dtype = delta_dtype(now, before)
        found = _sum_squares(now, before, scales, dtype)
        if dtype != torch.float64 and not all(square is None or TINY_SQUARES < square < math.inf for square in found):
            # Not finite, or squares overflow or vanish in float32.
            found = _sum_squares(now, before, scales, torch.float64)
        change, whitened, size = (0.0 if square is None else square for square in found)
        return change, whitened, size

    def facts(self, total: torch.Tensor) -> Facts:
        """What the sum of all readings tells of the whole matrix."""
        numbers = total.cpu().numpy()
        height, width = self.shape
        rows, cols = numbers[:height], numbers[height : height + width]
        if self._turned:
            rows, cols = cols, rows
        largest = float(numbers[height + width : -len(SUMS)].max())
        nonfinite, change, whitened, size = numbers[-len(SUMS) :].tolist()
        return Facts(
            profile=Energies(rows, cols, largest, int(nonfinite)).profile(),
            change=None if self._before is None else _rounded_up(change),
            whitened_change=_rounded_up(whitened) if self._is_whitened else None,
            relative_change=math.sqrt(change / size) if size and math.isfinite(change / size) else None,
        )


def cut_dim(shard: Shard, name: str) -> int:
    """The stored dimension that is cut: 0 or 1.

    Raises:
        InputError: no matrix, or cut otherwise than by rows or columns.
    """
    if len(shard.shape) == 2 and shard.layout in (ROWS, COLUMNS):
        return (ROWS, COLUMNS).index(shard.layout)
    raise InputError(
        f"{name!r} of shape {tuple(shard.shape)} is cut by {shard.layout}; a matrix is screened where it lies "
        "only when it is cut by rows or columns: assemble it on one process."
    )


def _placed(shard: Shard) -> tuple[object, ...]:
    return tuple(shard.shape), shard.layout, tuple(shard.ranges), shard.turned


def _rounded_up(squares: float) -> float | None:
    return math.sqrt(squares) * (1.0 + ROUNDING) if math.isfinite(squares) else None


def _sum_squares(
    now: torch.Tensor, before: torch.Tensor, scales: Sequence[torch.Tensor | None], dtype: torch.dtype
) -> tuple[float | None, float | None, float]:
    """Squares of the change and of the whitened change, None where there is none, and of `before`."""
    rows, cols = (None if scale is None else scale.to(now.device, torch.float64).square().to(dtype) for scale in scales)
    change = whitened = None
    size = 0.0
    for part, new, old in paired_chunks(now, before, dtype):
        size += float(_sum_of_squares(old))
        delta = torch.sub(new, old)
        if change is None and not bool(delta.any()):
            continue
        change = (change or 0.0) + float(_sum_of_squares(delta))
        if rows is not None or cols is not None:
            squares = delta.mul_(delta)
            energies = squares.sum(1) if cols is None else torch.mv(squares, cols)
            whitened = (whitened or 0.0) + float(energies.sum() if rows is None else torch.dot(energies, rows[part]))
    return change, whitened, size


def _sum_of_squares(values: torch.Tensor) -> torch.Tensor:
    flat = values.reshape(-1)
    return torch.dot(flat, flat)
