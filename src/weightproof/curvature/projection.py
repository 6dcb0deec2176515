"""One weight matrix edited by its curvature: keep the directions that carry most of it, and drop the flat ones.

With the Kronecker factors A = E[a a'] of a layer's inputs and G = E[g g'] of the gradients at its outputs, and
C = U_G' W U_A the weights in their eigenbases, the pairs (i, j) of largest curvature lambda_i mu_j are kept until they
carry `energy` of the whole; W' = U_G (C o M) U_A'. Averaged over data, what is recited from memory lies in the flat
pairs (arXiv:2510.24256). Facts and arithmetic suffer with it: measure them too.

| formula | saliency of pair (i, j) |
| --- | --- |
| original | lambda_i mu_j |
| modified | lambda_i mu_j C_ij^2: twice the second-order loss of zeroing the pair (arXiv:1905.05934) |
| ekfac | E[(u_i' g)^2 (v_j' a)^2] instead of lambda_i mu_j (arXiv:1806.03884) |

Nothing is damped in the ranking, pairs of equal saliency stay or go together, and `energy=1` gives back the very bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from weightproof.curvature.eigenbasis import Eigenbasis, checked_factor, eigenbasis
from weightproof.curvature.mask import RaggedMask, StaircaseMask, check_energy, ragged, staircase
from weightproof.errors import InputError

__all__ = ["FORMULAS", "FactorBases", "edit_matrix", "project"]

FORMULAS = ("original", "modified", "ekfac")

# Products of fewer rows run slower; of saliencies several copies of a block are held at once.
_PRODUCT_ELEMENTS = 1 << 19
_SALIENCY_ELEMENTS = 1 << 17


def edit_matrix(
    weight: torch.Tensor,
    activation_covariance: torch.Tensor,
    gradient_covariance: torch.Tensor,
    energy: float,
    formula: str = "original",
) -> torch.Tensor:
    """Keep `energy` of the curvature of one weight matrix.

    Args:
        weight: (d_out, d_in).
        activation_covariance: A, (d_in, d_in): E[a a'] of the inputs, or any multiple of it.
        gradient_covariance: G, (d_out, d_out): E[g g'] of the loss's gradients at the outputs, or any multiple of it.
        energy: Share of the saliency to keep, 0 to 1; 1 gives the same bits back, 0 gives zeros.
        formula: "original" or "modified"; "ekfac" needs corrected eigenvalues (`weightproof.edits.KFAC`).

    Returns:
        A fresh (d_out, d_in) tensor in the dtype of `weight`, rounded once.

    Raises:
        InputError: If shapes do not fit, a factor is not finite or not symmetric, `energy` is out of range, or
            the formula is unknown.

    Example:
        >>> W = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> A, G = torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([4.0, 1.0]))
        >>> edit_matrix(W, A, G, 0.7)    # curvatures 12 4 / 3 1
        tensor([[1., 2.],
                [0., 0.]])
    """
    energy = check_energy(energy)
    if formula not in FORMULAS[:2]:
        more = " (it needs corrected eigenvalues: use weightproof.edits.KFAC)" if formula == "ekfac" else ""
        raise InputError(f"formula must be 'original' or 'modified', not {formula!r}{more}")
    if weight.ndim != 2 or not weight.is_floating_point():
        raise InputError(f"weight must be a floating point matrix (d_out, d_in), not {list(weight.shape)}")
    checked_factor(gradient_covariance, weight.shape[0], "the gradient covariance")
    checked_factor(activation_covariance, weight.shape[1], "the activation covariance")
    if energy == 1.0:
        return weight.detach().clone()
    bases = FactorBases(
        eigenbasis(gradient_covariance, "the gradient covariance"),
        eigenbasis(activation_covariance, "the activation covariance"),
    )
    return project(weight, bases, energy, formula)[0]


@dataclass(frozen=True)
class FactorBases:
    """The decomposed factors of one matrix, made once for many energies.

    Attributes:
        gradient: Of G, (d_out, d_out).
        activation: Of A, (d_in, d_in).
        corrected: (d_out, d_in) corrected eigenvalues for "ekfac", rows and columns in the order of the bases.
    """

    gradient: Eigenbasis
    activation: Eigenbasis
    corrected: torch.Tensor | None = None


def project(
    weight: torch.Tensor, bases: FactorBases, energy: float, formula: str = "original"
) -> tuple[torch.Tensor, StaircaseMask | RaggedMask]:
    """As `edit_matrix`, with factors that are decomposed already.

    Args:
        weight: (d_out, d_in), finite.
        bases: The decomposed factors.
        energy: Share to keep.
        formula: One of `FORMULAS`.

    Returns:
        The edited matrix, and which pairs were kept.

    Raises:
        InputError: If the weights are not finite, or "ekfac" is asked for without its eigenvalues.
    """
    energy = check_energy(energy)
    if not bool(torch.isfinite(weight).all()):
        raise InputError("the weights hold NaN or inf: they cannot be edited")
    if formula == "original":
        return _by_products(weight, bases, energy)
    if formula == "ekfac" and bases.corrected is None:
        raise InputError(
            "formula 'ekfac' needs corrected eigenvalues: fit them too (weightproof factors fit --ekfac, or "
            "weightproof.curvature.fitting.correct_eigenvalues)"
        )
    return _by_saliency(weight, bases, energy, bases.corrected if formula == "ekfac" else None)


def _by_products(weight: torch.Tensor, bases: FactorBases, energy: float) -> tuple[torch.Tensor, StaircaseMask]:
    mask = staircase(bases.gradient.values, bases.activation.values, energy)
    if mask.kept_pairs == weight.numel():
        return weight.detach().clone(), mask
    left, right = bases.gradient.vectors[:, : mask.rows], bases.activation.vectors[:, : mask.columns]
    room, left, right = _room(weight, left, right)
    mask.zero_outside(_rotate(room, left, right))
    return _rotate_back(room, left, right).to(weight.dtype), mask


def _by_saliency(
    weight: torch.Tensor, bases: FactorBases, energy: float, corrected: torch.Tensor | None
) -> tuple[torch.Tensor, RaggedMask]:
    if energy == 0.0:
        return torch.zeros_like(weight), RaggedMask(math.inf, 0.0, 0)
    if energy == 1.0:
        return weight.detach().clone(), RaggedMask(0.0, 1.0, weight.numel())
    room, left, right = _room(weight, bases.gradient.vectors, bases.activation.vectors)
    coefficients = _rotate(room, left, right)

    def saliencies() -> Iterator[torch.Tensor]:
        for start, stop in _row_blocks(coefficients, _SALIENCY_ELEMENTS):
            if corrected is None:
                curvature = bases.gradient.values[start:stop, None] * bases.activation.values
                yield (curvature * coefficients[start:stop].to(torch.float64).square()).cpu()
            else:
                yield corrected[start:stop].to("cpu", torch.float64)

    mask = ragged(saliencies, energy)
    if mask.kept_pairs == weight.numel():
        return weight.detach().clone(), mask
    _zero_below(coefficients, saliencies, mask.threshold)
    return _rotate_back(room, left, right).to(weight.dtype), mask


def _zero_below(coefficients: torch.Tensor, saliencies: Callable[[], Iterator[torch.Tensor]], threshold: float) -> None:
    places = _row_blocks(coefficients, _SALIENCY_ELEMENTS)
    for (start, stop), block in zip(places, saliencies(), strict=True):
        coefficients[start:stop].masked_fill_((block < threshold).to(coefficients.device), 0.0)


def _room(
    weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A copy of the weights in which all work is done, and the bases in its dtype.

    float64 where both bases are: twice the memory of a float32 matrix. With the result, rounded from it at the end,
    three such matrices; products are made in blocks and put where their factors were.
    """
    both = left.dtype == right.dtype == torch.float64
    dtype = torch.float64 if both or weight.dtype == torch.float64 else torch.float32
    return weight.detach().to(dtype, copy=True), left.to(dtype), right.to(dtype)


def _rotate(room: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Replace W by C = U' W V in the upper left corner, of which a view is returned: (rows, columns) of the bases."""
    for start, stop in _row_blocks(room):
        room[start:stop, : right.shape[1]] = room[start:stop] @ right
    corner = room[:, : right.shape[1]]
    for start, stop in _column_blocks(corner):
        corner[: left.shape[1], start:stop] = left.T @ corner[:, start:stop]
    return corner[: left.shape[1]]


def _rotate_back(room: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Replace C in the upper left corner by U C V', which fills all of it."""
    for start, stop in _row_blocks(room[: left.shape[1]]):
        room[start:stop] = room[start:stop, : right.shape[1]] @ right.T
    for start, stop in _column_blocks(room):
        room[:, start:stop] = left @ room[: left.shape[1], start:stop]
    return room


def _row_blocks(matrix: torch.Tensor, elements: int = _PRODUCT_ELEMENTS) -> Iterator[tuple[int, int]]:
    return _blocks(matrix.shape[0], matrix.shape[1], elements)


def _column_blocks(matrix: torch.Tensor) -> Iterator[tuple[int, int]]:
    return _blocks(matrix.shape[1], matrix.shape[0], _PRODUCT_ELEMENTS)


def _blocks(count: int, length: int, elements: int) -> Iterator[tuple[int, int]]:
    """Ranges of `count` rows of `length` elements, so that each holds about `elements`."""
    step = max(1, elements // max(1, length))
    for start in range(0, count, step):
        yield start, min(start + step, count)
