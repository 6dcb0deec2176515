"""What a model takes on disk when each of its matrices has a width: codes, scales, zero points, and all the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from weightproof.edits.mixed import Mixed
from weightproof.kinds import check_grid
from weightproof.types import WeightMatrix
from weightproof.weights import iter_tensors

# A scale as quantized files keep it: one number in half precision for each group.
SCALE_BITS = 16
HALF_BYTES = 2


@dataclass(frozen=True)
class Grid:
    """What shares one scale, the same for every matrix of a plan; as in `weightproof.edits.RTN`."""

    granularity: str = "channel"
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        """Refuse what no edit could be made with."""
        check_grid(8, self.granularity, self.group_size, max_bits=8)

    def edit(self, bits: dict[str, int]) -> Mixed:
        """The edit that gives each matrix its width on this grid."""
        return Mixed(bits, self.granularity, self.group_size, self.symmetric)

    def num_groups(self, matrix: WeightMatrix) -> int:
        """Scales of one matrix."""
        if self.granularity == "tensor":
            return 1
        return matrix.d_out * (1 if self.group_size is None else -(-matrix.d_in // self.group_size))

    def num_bytes(self, matrix: WeightMatrix, bits: int) -> int:
        """Packed codes, a scale of 16 bits a group and, where the grid is not symmetric, a zero point of `bits` bits.

        Example:
            >>> from weightproof.weights import iter_weight_matrices
            >>> (matrix,) = iter_weight_matrices(nn.Linear(256, 128))
            >>> 8 * Grid("group", 64).num_bytes(matrix, 4) / (128 * 256)
            4.25
        """
        per_group = SCALE_BITS + (0 if self.symmetric else bits)
        return -(-(matrix.d_out * matrix.d_in * bits + self.num_groups(matrix) * per_group) // 8)

    def params(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return {"granularity": self.granularity, "group_size": self.group_size, "symmetric": self.symmetric}


@dataclass(frozen=True)
class ModelSize:
    """Bytes of every parameter and stored buffer of a model, each storage once.

    Attributes:
        stored: As the model holds them.
        half: The same with every floating point tensor in 16 bits.
        others: Of `stored`, what no plan touches: embeddings, norms, biases, matrices left out.
    """

    stored: int
    half: int
    others: int

    @classmethod
    def of(cls, model: nn.Module, planned: Iterable[WeightMatrix]) -> ModelSize:
        """Measure a model, of which `planned` are the matrices that get a width."""
        stored = half = 0
        for named in iter_tensors(model):
            if named.persistent:
                count, width = math.prod(named.shape), named.tensor.dtype.itemsize
                stored += count * width
                half += count * (min(width, HALF_BYTES) if named.tensor.is_floating_point() else width)
        inside = sum(matrix.d_out * matrix.d_in * matrix.dtype.itemsize for matrix in planned)
        return cls(stored, half, stored - inside)
