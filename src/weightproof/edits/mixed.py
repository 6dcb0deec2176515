"""Mixed precision: round-to-nearest with a width of its own for each matrix, as a planner or a person chose it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from weightproof.edits.rtn import RTN
from weightproof.errors import InputError
from weightproof.kinds import Quantize
from weightproof.types import ContractReading, WeightMatrix


class QuantizeEach(Quantize):
    """The contract of `Quantize`, with a width of its own for each matrix.

    A matrix that has no width must not change at all. As a `Quantize` it promises the largest of the widths.

    Attributes:
        widths: Matrix name -> bits.
    """

    widths: Mapping[str, int]

    def __init__(self, widths: Mapping[str, int], granularity: str = "channel", group_size: int | None = None) -> None:
        super().__init__(max(widths.values(), default=0), granularity, group_size)
        object.__setattr__(self, "widths", dict(widths))

    def params(self) -> dict[str, Any]:
        """`bits` is the mapping from matrix to width here."""
        return {"bits": dict(self.widths), "granularity": self.granularity, "group_size": self.group_size}

    def measure(self, name: str, before: torch.Tensor, after: torch.Tensor) -> tuple[ContractReading, ...]:
        """The numbers of `Quantize` at the width of this matrix; for any other, the share of altered weights."""
        if name in self.widths:
            return Quantize(self.widths[name], self.granularity, self.group_size).measure(name, before, after)
        alike = before.shape == after.shape
        altered = float((before != after).to(torch.float64).mean()) if alike and before.numel() else float(not alike)
        return (ContractReading(name, "altered_fraction", altered, 0.0, rigorous=True),)

    def __eq__(self, other: object) -> bool:
        """Equal widths on an equal grid."""
        return isinstance(other, QuantizeEach) and self.params() == other.params()

    def __hash__(self) -> int:
        """Of widths and grid."""
        return hash((frozenset(self.widths.items()), self.granularity, self.group_size))


@dataclass(frozen=True)
class Mixed:
    """Round-to-nearest quantization (simulated) with a width for each matrix; see `RTN` for the grid.

    Attributes:
        bits: Matrix name -> 2 to 8. Any other matrix stays as it is.
        granularity: As in `RTN`, one for all matrices.
        group_size: As in `RTN`.
        symmetric: As in `RTN`.

    Raises:
        InputError: If there is no matrix, or a width or the grid is out of range.

    Example:
        >>> Mixed({"layers.0.mlp.up_proj.weight": 4, "layers.0.mlp.down_proj.weight": 3}).name
        'mixed-int3-4-channel'
    """

    bits: Mapping[str, int]
    granularity: str = "channel"
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        """Validate the parameters, each width with its matrix's name."""
        widths: object = self.bits
        if not isinstance(widths, Mapping) or not widths or not all(isinstance(name, str) for name in widths):
            raise InputError("bits must be a mapping of matrix name -> width (2 to 8), with at least one matrix")
        for name, width in widths.items():
            try:
                self._grid(width)
            except InputError as error:
                raise InputError(f"{name}: {error}") from error
        object.__setattr__(self, "bits", dict(sorted(self.bits.items())))

    @property
    def name(self) -> str:
        """`mixed-int<widths>-<granularity>`, with the group size for groups, and `-asym` with a zero point."""
        widths = "-".join(str(width) for width in sorted(set(self.bits.values())))
        return f"mixed-int{widths}-{self.granularity}{self.group_size or ''}{'' if self.symmetric else '-asym'}"

    @property
    def kind(self) -> QuantizeEach:
        """The contract: for each matrix at most 2^bits levels per group, errors within half a step."""
        return QuantizeEach(self.bits, self.granularity, self.group_size)

    def params(self) -> dict[str, Any]:
        """All parameters, ready for JSON."""
        grid = {"granularity": self.granularity, "group_size": self.group_size, "symmetric": self.symmetric}
        return {"bits": dict(self.bits), **grid}

    def selects(self, matrix: WeightMatrix) -> bool:
        """Whether `matrix` has a width and can be read."""
        return matrix.refusal is None and matrix.name in self.bits

    def unmatched(self, matrices: Iterable[WeightMatrix]) -> tuple[str, ...]:
        """Names with a width that none of these matrices has, or that cannot be read."""
        readable = {matrix.name for matrix in matrices if matrix.refusal is None}
        return tuple(name for name in self.bits if name not in readable)

    def plan(self, matrix: WeightMatrix, context: object = None) -> torch.Tensor | None:
        """The quantized matrix (d_out, d_in) in its storage dtype; None when it has no width. Pure."""
        if not self.selects(matrix):
            return None
        return self._grid(self.bits[matrix.name], (matrix.name,)).plan(matrix, context)

    def _grid(self, bits: int, include: tuple[str, ...] = ("*",)) -> RTN:
        return RTN(bits, self.granularity, self.group_size, self.symmetric, include=include)
