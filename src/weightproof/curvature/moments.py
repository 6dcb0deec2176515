"""Running sums over tokens, of all matrices that are fitted in one pass over the data.

The sum of a a' belongs to an input, not to a matrix: it is kept once for every set of matrices that read the same
inputs, and the sum of a matrix is that of the sets that it is in. Both sums are symmetric, so only the blocks on and
above the diagonal are made: about 5/8 of the multiplications.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from weightproof.collective import Processes
from weightproof.errors import InputError

__all__ = ["CorrectedMoments", "MatrixSums", "Moments", "TokenSums"]

# Blocks of columns, and how narrow they may get: more save little, and narrow products run slower.
_BLOCKS = 4
_NARROWEST = 128


class TokenSums(Protocol):
    """What takes in the tokens of matrices."""

    def add(self, name: str, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        """The gradients (n, d_out) of a matrix arrived for these inputs, (n, d_in)."""
        ...

    def add_inputs(self, names: tuple[str, ...], inputs: torch.Tensor) -> None:
        """The gradients of all these matrices arrived for these inputs, (n, d_in); sorted, one name for each call."""
        ...


@dataclass(frozen=True)
class MatrixSums:
    """Sums of one matrix over all processes, on the CPU.

    Attributes:
        activation: (d_in, d_in), sum of a a'; the same tensor for matrices that read the same inputs.
        gradient: (d_out, d_out), sum of g g'.
        tokens: How many.
    """

    activation: torch.Tensor
    gradient: torch.Tensor
    tokens: int


@dataclass
class Moments:
    """Sums of a a' and g g'; additive.

    Attributes:
        sizes: (d_out, d_in) by name of the matrix.
        dtype: In which batches are added up. Products of one batch are made in float32 (float64 for float64 models).
        device: Where the sums are.
        activation: (d_in, d_in), by the matrices that read the inputs; upper blocks only.
        gradient: (d_out, d_out), by matrix; upper blocks only.
        tokens: How many, by matrix.
    """

    sizes: Mapping[str, tuple[int, int]]
    dtype: torch.dtype
    device: torch.device
    activation: dict[tuple[str, ...], torch.Tensor] = field(default_factory=dict)
    gradient: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        """Account for gradients (n, d_out)."""
        if name not in self.gradient:
            self.gradient[name] = self._zeros(self.sizes[name][0])
        _add_products(self.gradient[name], gradients)
        self.tokens[name] = self.tokens.get(name, 0) + len(inputs)

    def add_inputs(self, names: tuple[str, ...], inputs: torch.Tensor) -> None:
        """Account for inputs (n, d_in) that these matrices read."""
        if names not in self.activation:
            self.activation[names] = self._zeros(self.sizes[names[0]][1])
        _add_products(self.activation[names], inputs)

    def over(self, processes: Processes) -> dict[str, MatrixSums]:
        """The sums over all processes, by matrix; the same on every one, and apart from the running sums.

        Raises:
            InputError: If a sum is not finite, naming the matrix.
        """
        # Which inputs are shared is found while the data is read; a process without data found nothing.
        found = processes.gather("inputs that matrices share", sorted(self.activation))
        shared = {
            names: self._whole(processes, " ".join(names), self.activation.get(names), self.sizes[names[0]][1])
            for names in sorted({names for rank in found for names in rank})
        }
        joined: dict[tuple[tuple[str, ...], ...], torch.Tensor] = {}
        result = {}
        for name, (d_out, d_in) in self.sizes.items():
            parts = tuple(names for names in shared for _ in range(names.count(name)))
            if parts not in joined:
                joined[parts] = _sum([shared[names] for names in parts], d_in, self.dtype)
            gradient = self._whole(processes, name, self.gradient.get(name), d_out)
            for one in (joined[parts], gradient):
                if not bool(torch.isfinite(one).all()):
                    raise InputError(f"the inputs or gradients of {name} are not finite: it has no factors")
            result[name] = MatrixSums(joined[parts], gradient, _count(processes, name, self.tokens.get(name, 0)))
        return result

    def _whole(self, processes: Processes, what: str, mine: torch.Tensor | None, size: int) -> torch.Tensor:
        """A sum over all processes with its lower half."""
        own = torch.zeros(size, size, dtype=self.dtype) if mine is None else mine.cpu().clone()
        (total,) = processes.sum(f"factors of {what}", [own])
        for block, below in _blocks(size):
            total[below, block] = total[block, below].T
        return total

    def _zeros(self, size: int) -> torch.Tensor:
        return torch.zeros(size, size, dtype=self.dtype, device=self.device)


@dataclass
class CorrectedMoments:
    """Sums of (u_i' g)^2 (v_j' a)^2 in given eigenbases; additive.

    Attributes:
        bases: (d_out, d_out) eigenvectors u of G and (d_in, d_in) eigenvectors v of A in columns, by matrix.
        total: (d_out, d_in), by matrix.
        tokens: How many, by matrix.
    """

    bases: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    total: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        """Account for some tokens: (n, d_in) and (n, d_out)."""
        left, right = self.bases[name]
        if name not in self.total:
            self.total[name] = left.new_zeros(len(left), len(right))
        rotated = (gradients.to(left.dtype) @ left).square_(), (inputs.to(left.dtype) @ right).square_()
        self.total[name].addmm_(rotated[0].T, rotated[1])
        self.tokens[name] = self.tokens.get(name, 0) + len(inputs)

    def add_inputs(self, names: tuple[str, ...], inputs: torch.Tensor) -> None:
        """Nothing: inputs count together with gradients."""

    def over(self, processes: Processes) -> dict[str, tuple[torch.Tensor, int]]:
        """The sums and tokens over all processes, on the CPU.

        Raises:
            InputError: If a sum is not finite, naming the matrix.
        """
        result = {}
        for name, (left, right) in self.bases.items():
            mine = self.total.get(name)
            own = torch.zeros(len(left), len(right), dtype=left.dtype) if mine is None else mine.cpu().clone()
            (total,) = processes.sum(f"corrected eigenvalues of {name}", [own])
            if not bool(torch.isfinite(total).all()):
                raise InputError(f"the inputs or gradients of {name} are not finite: it has no factors")
            result[name] = total, _count(processes, name, self.tokens.get(name, 0))
        return result


def _add_products(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add rows' rows to the blocks of `total` on and above the diagonal."""
    work = rows if rows.dtype == torch.float64 else rows.float()
    for block, _ in _blocks(total.shape[0]):
        total[block, block.start :].add_(work[:, block].T @ work[:, block.start :])


def _blocks(size: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of rows or columns, each with all that is behind it."""
    step = max(_NARROWEST, -(-size // _BLOCKS))
    for start in range(0, size, step):
        yield slice(start, start + step), slice(start + step, size)


def _sum(parts: list[torch.Tensor], size: int, dtype: torch.dtype) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0]
    total = torch.zeros(size, size, dtype=dtype)
    for part in parts:
        total += part
    return total


def _count(processes: Processes, name: str, mine: int) -> int:
    return sum(processes.gather(f"tokens of {name}", mine))
