"""Optional corrections: bring a matrix back to the very limit that it is judged by.

Off by default (`correct: null`). The session applies them through the snapshot, to tied copies once,
and measures and judges again; what cannot be brought back stays as the guard judged it. A correction
never raises a singular value, and its limit is read from the same `Limits` object as the verdict's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from weightproof.guards.conclude import edit_kind
from weightproof.guards.rmt import NO_GAIN, RMTLimits, growth_of
from weightproof.guards.spectral import GROWTH, Spectral, SpectralLimits, deviations_of
from weightproof.spectrum import measure_spectrum
from weightproof.types import Outcome, Readings

# A corrected matrix is rounded to its storage dtype: aim one bf16 ulp below the limit, not at it
# (or half way to the baseline where the limit is narrower than that).
ROUNDING_ROOM = 2.0**-8


@dataclass(frozen=True, slots=True)
class Correction:
    """The top singular value, in the units of the weights, that one matrix is brought back to."""

    name: str
    max_singular_value: float


def corrections(before: Readings, after: Readings, limits: SpectralLimits | RMTLimits) -> tuple[Correction, ...]:
    """Which matrices to correct, and to which top singular value; empty when `limits.correct` is None or in training.

    Spectral limits: matrices that the guard flags because s1 has grown beyond kappa_f, back to s1 exp(kappa_f).
    RMT limits: matrices whose s1 / edge may have grown beyond `max_growth`, only with `clip` and only
    under the global null: a factor moves matrix and fitted edge together, and a whitened edge bounds
    no raw singular value, so in those cases nothing is proposed and the verdict stands.
    """
    kind = edit_kind(after)
    if limits.correct is None or kind == "train":
        return ()
    if isinstance(limits, SpectralLimits):
        return tuple(_to_kappa(before, after, limits))
    return tuple(_to_growth_limit(before, after, limits)) if limits.correct == "clip" and kind in NO_GAIN else ()


def _to_kappa(before: Readings, after: Readings, limits: SpectralLimits) -> Iterator[Correction]:
    flagged = {
        item.target
        for item in Spectral().judge(before, after, limits).measurements
        if item.statistic == GROWTH and item.outcome in {Outcome.WARN, Outcome.FAIL}
    }
    for name in (name for name in after.matrices if name in flagged):
        old = before.matrices[name]
        growth = next(item for item in deviations_of(old, after.matrices[name], limits) if item.statistic == GROWTH)
        if not math.isfinite(growth.high) or growth.high <= growth.kappa:
            continue
        # Judged is log((s1' + error') / (s1 - error)), so the target starts from the lower end of s1.
        proven = (old.spectral_norm or 0.0) - (old.spectral_norm_error or 0.0)
        target = proven * math.exp(growth.kappa) * (1.0 - min(ROUNDING_ROOM, growth.kappa / 2))
        yield Correction(name, target)


def _to_growth_limit(before: Readings, after: Readings, limits: RMTLimits) -> Iterator[Correction]:
    for name, new in after.bulks.items():
        old = before.bulks.get(name)
        if old is None or old.null != "global" or new.null != "global":
            continue
        growth = growth_of((old, new))
        if growth is None or not math.isfinite(growth) or growth <= limits.max_growth or not new.edge_plus:
            continue
        target = limits.max_growth * (old.top_over_edge or 0.0) * new.edge_plus * (1.0 - ROUNDING_ROOM)
        yield Correction(name, target)


def apply_correction(matrix: torch.Tensor, correction: Correction, mode: str) -> torch.Tensor:
    """The corrected (d_out, d_in) matrix as a new tensor of at least float32; the input is not touched.

    `scale` multiplies the whole matrix by a factor below 1; `clip` cuts only the singular values above the limit and
    keeps their directions. A matrix with NaN or inf has no singular values: it comes back unchanged.
    """
    wide = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32), copy=True)
    if not bool(torch.isfinite(wide).all()):
        return wide
    if mode == "scale":
        spectrum = measure_spectrum(wide, name=correction.name)
        top = spectrum.spectral_norm + spectrum.spectral_norm_error
        return wide * (correction.max_singular_value / top) if top > correction.max_singular_value else wide
    left, values, right = torch.linalg.svd(wide.double(), full_matrices=False)
    excess = (values - correction.max_singular_value).clamp_min(0.0)
    return (wide.double() - (left * excess) @ right).to(wide.dtype)
