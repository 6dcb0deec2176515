"""A change of one matrix kept as two thin factors, and what can be said of it without making it dense."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from weightproof.errors import InputError


@dataclass(frozen=True, eq=False)
class LowRank:
    """left @ right, never formed unless asked for; a LoRA's s B A with the scaling folded into B.

    Attributes:
        left: (d_out, r), float32.
        right: (r, d_in), float32.

    Raises:
        InputError: The factors do not belong together.

    Example:
        >>> LowRank(torch.ones(3, 1), torch.ones(1, 2)).shape
        (3, 2)
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        """Detach, cast to float32, and refuse factors that cannot be multiplied."""
        for key in ("left", "right"):
            factor = getattr(self, key)
            if not isinstance(factor, Tensor) or factor.ndim != 2 or not factor.is_floating_point():
                raise InputError(f"{key} of a low-rank delta must be a 2-D tensor of floating point numbers")
            object.__setattr__(self, key, factor.detach().to(torch.float32))
        if self.left.shape[1] != self.right.shape[0]:
            raise InputError(
                f"the factors of a low-rank delta do not fit: left is {list(self.left.shape)}, right is "
                f"{list(self.right.shape)}; they must be (d_out, r) and (r, d_in)"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the matrix."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """r: an upper bound of the rank."""
        return self.left.shape[1]

    def dense(self) -> Tensor:
        """The change itself, (d_out, d_in), float32."""
        return self.left @ self.right.to(self.left.device)

    def scaled(self, alpha: float) -> LowRank:
        """Alpha times this."""
        return LowRank(self.left * alpha, self.right)

    def singular_values(self) -> Tensor:
        """The r singular values that can differ from zero, descending, float64: from the r x r core of two QRs."""
        left, right = self.left.to("cpu", torch.float64), self.right.to("cpu", torch.float64)
        core = torch.linalg.qr(left)[1] @ torch.linalg.qr(right.T)[1].T
        return torch.linalg.svdvals(core)


Part = LowRank | Tensor
"""What a delta holds of one matrix: factors, or all of it."""


def dense_of(part: Part) -> Tensor:
    """A part as a matrix (d_out, d_in), float32."""
    return part.dense() if isinstance(part, LowRank) else part


def scaled_part(part: Part, alpha: float) -> Part:
    """Alpha times a part."""
    return part.scaled(alpha) if isinstance(part, LowRank) else part * alpha


def added(first: Part, second: Part, alpha: float = 1.0) -> Part:
    """First + alpha * second: factors side by side where both are factored, [L1, alpha L2] and [R1; R2].

    Raises:
        InputError: They are of different shapes.
    """
    if tuple(first.shape) != tuple(second.shape):
        raise InputError(f"one is {list(first.shape)} (d_out, d_in), the other {list(second.shape)}")
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        left = torch.cat([first.left, alpha * second.left.to(first.left.device)], dim=1)
        return LowRank(left, torch.cat([first.right, second.right.to(first.right.device)]))
    return dense_of(first) + alpha * dense_of(second).to(dense_of(first).device)


def inner(first: Part, second: Part) -> float:
    """<first, second> = tr(first' second), float64; of factors from products of r x r matrices."""
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        (l1, r1), (l2, r2) = ((one.left.double(), one.right.double()) for one in (first, second))
        return float(((l1.T @ l2.to(l1.device)) * (r1 @ r2.to(r1.device).T).to(l1.device)).sum())
    if isinstance(first, LowRank):
        first, second = second, first
    assert isinstance(first, Tensor)
    if isinstance(second, LowRank):
        product = first.T.to(second.left.device, torch.float64) @ second.left.double()
        return float((product.T * second.right.to(product.device, torch.float64)).sum())
    return float((first.double() * second.to(first.device, torch.float64)).sum())


def frobenius(part: Part) -> float:
    """The Frobenius norm, float64."""
    return math.sqrt(max(0.0, inner(part, part)))


def largest_element(part: Part) -> float:
    """An upper bound of the largest absolute value of an element; NaN or inf where one is not finite.

    Of factors by Cauchy and Schwarz, the longest row of the left one times the longest column of the right one.
    """
    if isinstance(part, Tensor):
        return float(part.abs().max()) if part.numel() else 0.0
    if not part.left.numel() or not part.right.numel():
        return 0.0
    rows = torch.linalg.vector_norm(part.left.double(), dim=1).max()
    columns = torch.linalg.vector_norm(part.right.double(), dim=0).max()
    return float(rows) * float(columns)


def values_of(part: Part) -> Tensor:
    """Singular values of a part, descending, float64, on the CPU."""
    if isinstance(part, LowRank):
        return part.singular_values()
    return torch.linalg.svdvals(part.to("cpu", torch.float64))
