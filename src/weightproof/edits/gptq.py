"""GPTQ: rounding that makes good for its own errors, as far as the inputs of the layer let it.

Column by column, each weight is rounded and its error is spread over the columns that are still to come, by the
inverse of the second moments of the inputs (Frantar et al., arXiv:2210.17323).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from weightproof.edits.grids import Steps, range_of, steps_of
from weightproof.edits.hessians import input_hessians
from weightproof.edits.selection import Selection
from weightproof.errors import InputError
from weightproof.forward.calibration import calibration_windows
from weightproof.forward.windows import Windows
from weightproof.kinds import Quantize, check_grid
from weightproof.types import ContractReading, WeightMatrix
from weightproof.weights import iter_weight_matrices

_BLOCK = 128
# Sums of squares in another order differ in their last bits.
_SLACK = 1e-6


@dataclass(frozen=True, eq=False)
class Compensated(Quantize):
    """Rounded to a grid, with errors that make good for each other: the contract of GPTQ.

    Each weight may move by more than half a step, so that bound of `Quantize` does not hold. Instead every weight is a
    level of the declared grid, and the squared error of each output on the calibration windows, e H e' of a row's
    error e, is at most that of rounding to the nearest level: both are theorems about the edit, which takes every
    row from the better of the two.

    Attributes:
        symmetric: Whether the grid is.
        hessians: H (d_in, d_in) of each matrix by name.
    """

    symmetric: bool = True
    hessians: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)

    def params(self) -> dict[str, Any]:
        """The grid, and that errors were spread: a certificate's verifier cannot know the inputs."""
        return {**super().params(), "symmetric": self.symmetric, "method": "gptq"}

    def light(self) -> Compensated:
        """The same grid without the second moments."""
        return replace(self, hessians={})

    def measure(self, name: str, before: Tensor, after: Tensor) -> tuple[ContractReading, ...]:
        """Levels per group, weights off the grid, output error over that of RTN; and, not rigorous, relative error."""
        kept = ("levels_per_group", "relative_error")
        readings = tuple(one for one in super().measure(name, before, after) if one.statistic in kept)
        reason = readings[0].reason
        off_grid, worst_row = None, None
        if reason is None:
            weight = before.to(torch.float64)
            grid, now = grid_of(weight, self, symmetric=self.symmetric), after.to(weight.device)
            off_grid = float((grid.nearest(now.to(torch.float64)).to(now.dtype) != now).sum()) / max(1, now.numel())
            if name in self.hessians:
                worst_row = _worst_row(weight, now, grid, self.hessians[name].to(weight))
        unseen = None if name in self.hessians else "the second moments of its inputs are not at hand"
        return (
            *readings,
            ContractReading(name, "off_grid_fraction", off_grid, 0.0, rigorous=True, reason=reason),
            ContractReading(
                name, "output_error_over_rtn", worst_row, 1 + _SLACK, rigorous=True, reason=reason or unseen
            ),
        )


def _worst_row(before: Tensor, after: Tensor, grid: Steps, hessian: Tensor) -> float:
    """Largest ratio over rows of the output error (a root mean square) to that of the nearest levels."""
    ours = row_errors(before, after, hessian)
    theirs = row_errors(before, grid.nearest(before).to(after.dtype), hessian)
    ratio = torch.where(ours <= 0, 0.0, ours / theirs).sqrt()
    return float(ratio.nan_to_num(nan=math.inf, posinf=math.inf).max()) if len(ratio) else 0.0


@dataclass(frozen=True, eq=False)
class GPTQ(Selection):
    """Hessian-aware rounding: layer by layer the outputs on calibration windows stay nearer than with RTN.

    The grids are those of `RTN`, from the weights as they were. Second moments come from the unedited model, all
    layers in one pass; they take 4 d_in^2 bytes for each matrix (edit block by block with `include` where that is too
    much: then later blocks also see what was rounded before). A row that the method would leave worse than RTN on the
    windows is rounded to nearest, so that no row is worse. Stacks of experts are refused by name.

    Attributes:
        bits: 2 to 8.
        granularity: One scale per "channel" (a row of (d_out, d_in)), per "tensor" or per "group".
        group_size: Consecutive inputs per scale for "group".
        symmetric: Levels around 0; False adds a zero point.
        damping: Added to the diagonal of H, as a share of its mean.
        act_order: Round the inputs of the largest second moment first, while errors can still be spread.
        data: Calibration data (see `weightproof.forward.calibration.calibration_windows`), best of a few tens of
            windows that the retain data does not hold. None: the session's few windows on which outputs are compared,
            those of its retain data or, without them, random tokens.
        num_windows: How many windows of `data` to take.
        include: See `weightproof.edits.selection.Selection`.
        exclude: Globs that win over `include`.
        hessians: What `prepare` found; no parameter.

    Raises:
        InputError: If a parameter is out of range.

    Example:
        >>> GPTQ(4, "group", 64).name
        'gptq-int4-group64'
    """

    bits: int
    granularity: str = "channel"
    group_size: int | None = None
    symmetric: bool = True
    damping: float = 0.01
    act_order: bool = False
    data: Any = field(default=None, repr=False, kw_only=True)
    num_windows: int = field(default=32, kw_only=True)
    hessians: Mapping[str, Tensor] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Validate the parameters."""
        check_grid(self.bits, self.granularity, self.group_size, max_bits=8)
        super().__post_init__()
        if isinstance(self.damping, bool) or not isinstance(self.damping, (int, float)) or not 0 < self.damping <= 1:
            raise InputError(
                f"damping must be a share above 0 and at most 1 of the mean diagonal, not {self.damping!r}"
            )

    @property
    def name(self) -> str:
        """`gptq-int<bits>-<granularity>`, with the group size, and `-asym` with a zero point."""
        return f"gptq-int{self.bits}-{self.granularity}{self.group_size or ''}{'' if self.symmetric else '-asym'}"

    @property
    def kind(self) -> Compensated:
        """The contract: levels of the grid, no output further off than RTN's on the windows."""
        return Compensated(self.bits, self.granularity, self.group_size, self.symmetric, self.hessians or {})

    def params(self) -> dict[str, Any]:
        """All parameters but the data, ready for JSON."""
        grid = {"bits": self.bits, "granularity": self.granularity, "group_size": self.group_size}
        own = {"symmetric": self.symmetric, "damping": self.damping, "act_order": self.act_order}
        return {**grid, **own, "num_windows": self.num_windows, **self.selection_params()}

    def prepare(self, session: Any) -> GPTQ:
        """This edit with the second moments of the inputs of every matrix that it selects; weights untouched.

        Args:
            session: With `model`, `processes` and `windows`.

        Raises:
            InputError: There are no windows, or as `input_hessians`.
        """
        chosen = [matrix for matrix in iter_weight_matrices(session.model) if self.selects(matrix)]
        if not chosen:
            return self
        windows = self._windows(session)
        return self.knowing(hessians=input_hessians(session.model, chosen, windows, session.processes))

    def light(self) -> GPTQ:
        """This edit without the second moments: what a session keeps of it once it was judged."""
        return self.knowing(hessians=None)

    def _windows(self, session: Any) -> tuple[Windows, ...]:
        if self.data is not None:
            own = calibration_windows(self.data, session.model, count=self.num_windows)
            digests = session.processes.gather("calibration data of an edit", own.digest)
            others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
            if others:
                raise InputError(
                    f"{self.name}: rank {others[0]} was given other calibration data than rank 0. Give every process "
                    "the same; the windows are dealt to the processes here"
                )
            return (own,)
        known = tuple(one for one in session.windows if isinstance(one, Windows))
        if not known:
            raise InputError(f"{self.name} needs windows to run the model on: give data=, or the session retain=")
        return tuple(one for one in known if one.name != "random") or known

    def plan(self, matrix: WeightMatrix, context: object = None) -> Tensor | None:
        """The quantized matrix (d_out, d_in) in its storage dtype; None when it is not selected. Pure.

        Raises:
            InputError: If it was not prepared, or the matrix holds NaN or inf.
        """
        if not self.selects(matrix):
            return None
        before = matrix.load()
        if self.hessians is None or matrix.name not in self.hessians:
            raise InputError(f"{self.name} has not seen the inputs of {matrix.name}: prepare it (session.apply does)")
        weight = before.to(torch.float64)
        if not bool(torch.isfinite(weight).all()):
            raise InputError(f"{matrix.name} holds NaN or inf: there is no error to spread")
        hessian = self.hessians[matrix.name].to(weight)
        grid = grid_of(weight, self.kind, symmetric=self.symmetric)
        spread = compensated(weight, hessian, grid, self.damping, act_order=self.act_order).to(before.dtype)
        nearest = grid.nearest(weight).to(before.dtype)
        better = row_errors(weight, spread, hessian) <= row_errors(weight, nearest, hessian)
        return torch.where(better[:, None], spread, nearest)


def grid_of(weight: Tensor, kind: Quantize, *, symmetric: bool) -> Steps:
    """The grid of every element of a matrix: `delta` and `zero` of shape (d_out, d_in)."""
    parts = (weight,) if kind.group_size is None else weight.split(kind.group_size, dim=1)
    ranges = [torch.aminmax(weight)] if kind.granularity == "tensor" else [range_of(part) for part in parts]
    found = [steps_of(low, high, kind.bits, symmetric=symmetric) for low, high in ranges]
    delta, zero = (
        torch.cat([getattr(one, what).expand_as(part) for one, part in zip(found, parts, strict=True)], dim=1)
        for what in ("delta", "zero")
    )
    return found[0]._replace(delta=delta, zero=zero)


def row_errors(before: Tensor, after: Tensor, hessian: Tensor) -> Tensor:
    """Squared output error e H e' that each row's error e makes, (d_out,) float64."""
    error = after.to(torch.float64) - before
    return ((error @ hessian) * error).sum(1)


def compensated(weight: Tensor, hessian: Tensor, grid: Steps, damping: float, *, act_order: bool) -> Tensor:
    """Round column after column, each error spread over the columns to come; (d_out, d_in) float64.

    Args:
        weight: (d_out, d_in) float64.
        hessian: (d_in, d_in) float64.
        grid: Of every element, from the weights as they were.
        damping: Share of the mean diagonal added to the diagonal.
        act_order: Begin with the columns of the largest second moment.
    """
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(diagonal))
    order = order.to(weight.device)
    spread = inverse_factor(hessian[order][:, order], damping)
    # Transposed, so that a column lies in one piece of memory.
    left, delta, zero = (part.T[order].contiguous() for part in (weight, grid.delta, grid.zero))
    rounded = torch.empty_like(left)
    for start in range(0, len(left), _BLOCK):
        end = min(start + _BLOCK, len(left))
        errors = torch.empty_like(left[start:end])
        for column in range(start, end):
            rounded[column] = grid._replace(delta=delta[column], zero=zero[column]).nearest(left[column])
            error = (left[column] - rounded[column]) / spread[column, column]
            left[column:end] -= spread[column, column:end, None] * error
            errors[column - start] = error
        left[end:] -= spread[start:end, end:].T @ errors
    result = torch.empty_like(rounded)
    result[order] = rounded
    return result.T


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor U of (H + damping)^-1 = U' U: row i says where the error of column i goes."""
    size = hessian.shape[0]
    mean = float(hessian.diagonal().mean()) or 1.0  # inputs that are all zero: then nothing is spread
    damped = hessian + damping * mean * torch.eye(size, dtype=hessian.dtype, device=hessian.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)
