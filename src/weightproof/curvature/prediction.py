"""The loss change of an edit, foreseen from curvature: 1/2 tr(G E A E') per matrix, E = W' - W.

No forward pass is made. It is the second-order term of the loss at a minimum with the curvature of each matrix
approximated by a Kronecker product, summed over matrices: it ranks edits and says which matrix is to blame. It is
blind to norms and biases, loud on changes that preserve the function, and falls short on large edits
(docs/kfac.md has how far): advice, never a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weightproof.curvature.eigenbasis import checked_factor, eigenbasis
from weightproof.curvature.factors import Factor, Factors, require_values
from weightproof.errors import InputError
from weightproof.weights import iter_weight_matrices

__all__ = ["Prediction", "loss_form", "predict_loss_change", "quadratic_form"]


@dataclass(frozen=True)
class Prediction:
    """Predicted loss changes, nats per token.

    Attributes:
        by_matrix: Of each matrix that has factors, by name; None where its values are not finite.
        not_covered: Matrices that changed and have no factors.
    """

    by_matrix: Mapping[str, float | None]
    not_covered: tuple[str, ...]

    @property
    def total(self) -> float | None:
        """Sum over the matrices; None if one could not be predicted."""
        values = list(self.by_matrix.values())
        return None if any(value is None for value in values) else float(sum(value or 0.0 for value in values))

    def ranked(self) -> list[tuple[str, float]]:
        """Matrices from the largest predicted change down, those that are not finite first."""
        found = [(name, float("inf") if value is None else value) for name, value in self.by_matrix.items()]
        return sorted(found, key=lambda pair: -pair[1])


def predict_loss_change(
    factors: Factors, before: nn.Module | Mapping[str, Tensor], after: nn.Module | Mapping[str, Tensor]
) -> Prediction:
    """What an edit should cost, without running the model.

    Args:
        factors: Fitted at the weights `before`.
        before: A model, or matrices (d_out, d_in) by name.
        after: The same after the edit.

    Returns:
        The prediction, nats per token where the factors are of a loss summed over tokens.

    Raises:
        InputError: If `before` are not the weights that the factors were fitted at, names or shapes do not fit, or
            the factors are not finite, not symmetric or of fewer tokens than dimensions.
    """
    if isinstance(before, nn.Module):
        factors.require_matrices(iter_weight_matrices(before))
    factors.require_enough_tokens()
    old, new = _matrices(before), _matrices(after)
    found: dict[str, float | None] = {}
    for name in factors:
        if name not in old or name not in new:
            raise InputError(f"{name} has factors and is missing {'before' if name not in old else 'after'} the edit")
        if old[name].shape != new[name].shape:
            raise InputError(f"{name} changed its shape from {list(old[name].shape)} to {list(new[name].shape)}")
        require_usable(factors[name], old[name])
        change = new[name].to(torch.float64) - old[name].to(torch.float64)
        found[name] = loss_form(factors[name])(change) if bool(change.count_nonzero()) else 0.0
    others = [name for name in old if name not in factors and name in new and not torch.equal(old[name], new[name])]
    return Prediction(found, tuple(others))


def require_usable(factor: Factor, weight: Tensor) -> None:
    """Refuse a factor that is no covariance, or that was fitted at other weights than these, (d_out, d_in).

    Raises:
        InputError: Saying which of both, with the hashes of the weights.
    """
    checked_factor(factor.activation_sum, weight.shape[1], f"the factor A of {factor.name}")
    checked_factor(factor.gradient_sum, weight.shape[0], f"the factor G of {factor.name}")
    require_values(factor, weight)


# Of the sum of the absolute terms: far above what float32 sums of millions of terms are off by.
_ROUNDING = 1e-4


def quadratic_form(change: Tensor, activation_covariance: Tensor, gradient_covariance: Tensor) -> float | None:
    """1/2 tr(G E A E') for one matrix; None where it is not finite, or below zero by more than rounding.

    No covariances give a negative value: a factor that does has negative eigenvalues, and says nothing about a loss.

    Args:
        change: E, (d_out, d_in).
        activation_covariance: A, (d_in, d_in).
        gradient_covariance: G, (d_out, d_out).
    """
    dtype = activation_covariance.dtype
    change = change.to(dtype)
    terms = (gradient_covariance.to(dtype) @ change) * (change @ activation_covariance)
    value = 0.5 * float(terms.sum())
    if not math.isfinite(value) or value < -_ROUNDING * float(terms.abs().sum()):
        return None
    return max(value, 0.0)


def loss_form(factor: Factor) -> Callable[[Tensor], float | None]:
    """The quadratic form of one matrix: from its change E, (d_out, d_in), to nats per token; None if not finite.

    1/2 tr(G E A E'), or where the eigenvalues of EK-FAC were fitted, 1/2 sum_ij Lambda_ij (u_i' E v_j)^2 in the
    eigenbases u of G and v of A (arXiv:1806.03884): they see that large gradients come with certain inputs.
    """
    if factor.corrected_sum is None:
        activation, gradient = factor.activation_covariance, factor.gradient_covariance
        return lambda change: quadratic_form(change, activation, gradient)
    left, right = (
        eigenbasis(one, f"a factor of {factor.name}").vectors
        for one in (factor.gradient_covariance, factor.activation_covariance)
    )
    values = factor.corrected_sum / max(1, factor.tokens)

    def form(change: Tensor) -> float | None:
        rotated = left.T @ change.to(left.dtype) @ right.to(left.dtype)
        value = 0.5 * float((values.to(rotated) * rotated.square_()).sum())
        return value if math.isfinite(value) else None

    return form


def _matrices(given: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(given, nn.Module):
        return {one.name: one.load().detach() for one in iter_weight_matrices(given) if one.refusal is None}
    return dict(given)
