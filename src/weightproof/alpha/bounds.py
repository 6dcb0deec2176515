"""How far alpha may go, from spectra alone, before anything is written.

Two predictions for W + alpha D, each of one matrix:

- Weyl: |sigma_1(W + alpha D) - sigma_1(W)| <= |alpha| sigma_1(D). So the top singular value grows by no more than a
  factor k while |alpha| <= (k - 1) sigma_1(W) / sigma_1(D), and shrinks by no more while it is <= (1 - 1/k) times the
  same. k is what the policy's spectral guard allows. A theorem: nothing can be faster, much may be slower.
- Emergence (Baik, Ben Arous and Peche 2005; Benaych-Georges and Nadakuditi 2012): in noise of entry deviation s a
  direction of strength theta leaves the bulk of an m x n matrix where theta > s (m n)^(1/4), and is then seen at
  sqrt((theta^2 + s^2 m)(theta^2 + s^2 n)) / theta. So alpha* = s (m n)^(1/4) / sigma_1(D): from there on the delta
  shows as a new outlier. It holds for weights that are noise where D points; how well they follow the law is told.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from weightproof.alpha.fitting import Target, fitted, require_base
from weightproof.deltas import Delta
from weightproof.differences.factors import values_of
from weightproof.errors import InputError
from weightproof.guards.limits import for_family
from weightproof.guards.spectral import Spectral
from weightproof.marchenko_pastur import PURE_BULK_DISTANCE_TIMES_K, fit_bulk
from weightproof.numerics.random_matrix import observed_spike, visible_threshold
from weightproof.policy import Policy, load_policy
from weightproof.weights import iter_weight_matrices


@dataclass(frozen=True)
class SafeAlpha:
    """What is foretold of one matrix; |alpha| throughout.

    Attributes:
        name: Of the matrix.
        family: Its family, which the policy's limit depends on.
        d_out: Rows.
        d_in: Columns.
        sigma_weight: sigma_1(W).
        sigma_delta: sigma_1(D).
        limit: k, the largest ratio of sigma_1 that the policy's spectral guard passes without a word.
        bound: Up to here sigma_1 cannot grow beyond k: (k - 1) sigma_1(W) / sigma_1(D).
        shrink_bound: Up to here it cannot shrink below 1 / k either: (1 - 1/k) sigma_1(W) / sigma_1(D).
        noise: s, the deviation of the entries of the bulk (Marchenko-Pastur, from the median singular value).
        distance: Kolmogorov-Smirnov distance of the spectrum to that law.
        emergence: alpha*, from which D's first direction stands out of the bulk; None where `reason` says why.
        reason: Why a number is missing, or what to think of it; None: nothing to say.
    """

    name: str
    family: str
    d_out: int
    d_in: int
    sigma_weight: float | None
    sigma_delta: float
    limit: float
    bound: float | None
    shrink_bound: float | None
    noise: float | None
    distance: float | None
    emergence: float | None
    reason: str | None = None

    def predicted_norm(self, alpha: float) -> float | None:
        """Where alpha D's first direction would be seen in the bulk alone: its edge until it emerges."""
        if self.noise is None:
            return None
        return observed_spike(abs(alpha) * self.sigma_delta, self.d_out, self.d_in, self.noise)


@dataclass(frozen=True)
class AlphaTable:
    """What is foretold of every matrix of a delta.

    Attributes:
        rows: One for each, in the order of the model.
        policy: Whose limits they are.
    """

    rows: tuple[SafeAlpha, ...]
    policy: str

    def __iter__(self) -> Iterator[SafeAlpha]:
        """The rows."""
        return iter(self.rows)

    @property
    def binding(self) -> SafeAlpha | None:
        """The matrix whose growth bound is the smallest; None where no matrix has one."""
        return min((row for row in self.rows if row.bound is not None), key=_bound_of, default=None)

    @property
    def bound(self) -> float | None:
        """Up to here no top singular value can grow beyond the policy's limit; None where that is not known."""
        return None if self.binding is None or any(_is_unread(row) for row in self.rows) else self.binding.bound

    @property
    def shrink_bound(self) -> float | None:
        """Up to here none can shrink below it either."""
        found = [row.shrink_bound for row in self.rows if row.shrink_bound is not None]
        return min(found, default=None) if self.bound is not None else None

    @property
    def first_to_emerge(self) -> SafeAlpha | None:
        """The matrix in which the delta is the first to stand out of the bulk."""
        return min((row for row in self.rows if row.emergence is not None), key=_emergence_of, default=None)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        binding, first = self.binding, self.first_to_emerge
        return {
            "policy": self.policy,
            "bound": self.bound,
            "shrink_bound": self.shrink_bound,
            "binding": None if binding is None else binding.name,
            "emergence": None if first is None else first.emergence,
            "first_to_emerge": None if first is None else first.name,
            "rows": [asdict(row) for row in self.rows],
        }


def _bound_of(row: SafeAlpha) -> float:
    assert row.bound is not None
    return row.bound


def _emergence_of(row: SafeAlpha) -> float:
    assert row.emergence is not None
    return row.emergence


def _is_unread(row: SafeAlpha) -> bool:
    return row.bound is None and row.sigma_delta > 0.0


def safe_alpha(
    model: nn.Module, delta: Delta | Path | str, policy: str | Path | Policy = "balanced", *, same_base: bool = True
) -> AlphaTable:
    """Foretell how far a delta can be taken, from the spectra of the weights as they are; nothing is written.

    Reads each matrix of the delta once, for its singular values. What outputs and loss say of an alpha is another
    matter: `search_alpha` asks the guards.

    Args:
        model: The model that would be steered.
        delta: What would be added.
        policy: Whose limit of spectral growth counts.
        same_base: False: foretell it for other weights than it was made for, too.

    Raises:
        InputError: The delta does not fit the model, or was made for other weights.
    """
    delta = delta if isinstance(delta, Delta) else Delta.load(delta)
    found = load_policy(policy)
    kappa = found.limits_for(Spectral).kappa
    targets = fitted(delta, iter_weight_matrices(model))
    if same_base:
        require_base(delta, targets, lambda matrix: matrix.load())
    rows = (_row(one, math.exp(for_family(kappa, one.matrix.family))) for one in targets)
    return AlphaTable(tuple(rows), found.name)


def _row(target: Target, limit: float) -> SafeAlpha:
    matrix, sigma_delta = target.matrix, float(values_of(target.part)[:1].sum())
    common: dict[str, Any] = {
        "name": matrix.name, "family": matrix.family, "d_out": matrix.d_out, "d_in": matrix.d_in,
        "sigma_delta": sigma_delta, "limit": limit,
    }  # fmt: skip
    unread = dict.fromkeys(("sigma_weight", "bound", "shrink_bound", "noise", "distance", "emergence"))
    if matrix.shard is not None:
        return SafeAlpha(**common, **unread, reason="it is sharded over processes and whole on none of them")
    try:
        fit = fit_bulk(matrix.load(), null="global", name=matrix.name)
    except InputError as error:
        return SafeAlpha(**common, **unread, reason=str(error))
    top = float(fit.singular_values[0])
    emergence, reason = _emergence(fit.sigma_mp, matrix.d_out, matrix.d_in, sigma_delta)
    if reason is None and fit.ks_distance > max(0.1, PURE_BULK_DISTANCE_TIMES_K / len(fit.singular_values)):
        reason = f"the weights are far from noise (distance {fit.ks_distance:.2f}): alpha* is a rough guide"
    return SafeAlpha(
        **common,
        sigma_weight=top,
        bound=(limit - 1.0) * top / sigma_delta if sigma_delta else None,
        shrink_bound=(1.0 - 1.0 / limit) * top / sigma_delta if sigma_delta else None,
        noise=fit.sigma_mp,
        distance=fit.ks_distance,
        emergence=emergence,
        reason=reason if sigma_delta else "its delta is zero",
    )


def _emergence(noise: float, d_out: int, d_in: int, sigma_delta: float) -> tuple[float | None, str | None]:
    if noise == 0.0:
        return None, "the bulk of its spectrum is zero: any delta stands out"
    if sigma_delta == 0.0:
        return None, "its delta is zero"
    return visible_threshold(d_out, d_in, noise) / sigma_delta, None
