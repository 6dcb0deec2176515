"""Readings of one whole weight matrix: norms by the cheapest rung that decides, spikes by Weyl or by a fit.

Pure functions of a matrix's description and its values; the process that owns a matrix calls them,
whether the values were here all along or were put together from shards.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from weightproof.errors import InputError
from weightproof.marchenko_pastur import bound_num_spikes, fit_bulk, is_pure_bulk
from weightproof.spectrum import (
    NormEstimate,
    NormReference,
    Profile,
    delta_norm_bound,
    estimate_norm,
    measure_spectrum,
    profile,
    track_norm,
)
from weightproof.types import BulkFit, BulkReading, MatrixReading, WeightMatrix


def refused(matrix: WeightMatrix, method: str, reason: str) -> MatrixReading:
    """A matrix without numbers, and why."""
    return MatrixReading(
        matrix.name, matrix.family, matrix.d_out, matrix.d_in, None, None, None, None, None, None, method, reason
    )


def reading_of(matrix: WeightMatrix, facts: Profile, norm: NormEstimate | None) -> MatrixReading:
    """The reading of a matrix from its profile and its norm; refused where values are NaN or inf."""
    if facts.num_nonfinite or norm is None:
        return refused(matrix, "profile", f"{facts.num_nonfinite} values are NaN or inf")
    return MatrixReading(
        name=matrix.name,
        family=matrix.family,
        d_out=matrix.d_out,
        d_in=matrix.d_in,
        frobenius_norm=facts.frobenius_norm,
        spectral_norm=norm.value,
        spectral_norm_error=norm.error,
        norm_collapse=facts.norm_collapse,
        zero_rows=facts.zero_rows,
        zero_cols=facts.zero_cols,
        method=norm.method,
    )


def read_exactly(matrix: WeightMatrix, weight: torch.Tensor) -> MatrixReading:
    """Profile and exact spectral norm of a matrix, `weight` being its (d_out, d_in) values."""
    facts = profile(weight)
    if facts.num_nonfinite:
        return reading_of(matrix, facts, None)
    spectrum = measure_spectrum(weight, name=matrix.name)
    norm = NormEstimate(spectrum.spectral_norm, spectrum.spectral_norm_error, spectrum.method, 1)
    return reading_of(matrix, facts, norm)


def norm_limit(base: MatrixReading | None, band: float) -> tuple[float, float] | None:
    """The interval that the norm must stay in; None where only the exact norm will do.

    Args:
        base: The baseline's reading of the matrix.
        band: Half-width of the interval around its norm, in log units.
    """
    if base is None or not base.spectral_norm:
        return None
    factor = math.exp(band)
    # What is not known of the baseline is taken off the band, so that the ratio's whole interval is decided.
    doubt = base.spectral_norm_error or 0.0
    low, high = (base.spectral_norm + doubt) / factor, (base.spectral_norm - doubt) * factor
    return (low, high) if low < high else None


def norm_reference(known: MatrixReading | None) -> NormReference | None:
    """The last norm of a matrix, to start from; None where there is none."""
    if known is None or not known.spectral_norm:
        return None
    return NormReference(known.spectral_norm, known.spectral_norm_error or 0.0)


def read_tracked(
    matrix: WeightMatrix,
    weight: torch.Tensor,
    before: torch.Tensor | None,
    known: MatrixReading | None,
    limit: tuple[float, float] | None,
) -> MatrixReading:
    """The delta ladder where a previous state is at hand, a Lanczos estimate where it is not.

    Args:
        matrix: Which matrix.
        weight: (d_out, d_in), its values now.
        before: The values that `known` was read from, None where unknown.
        known: The last reading.
        limit: What the norm is held against (`norm_limit`); None asks for the exact norm.
    """
    if limit is None:
        return read_exactly(matrix, weight)
    facts = profile(weight)
    if facts.num_nonfinite:
        return reading_of(matrix, facts, None)
    reference = norm_reference(known)
    if before is not None and before.shape == weight.shape and reference is not None:
        return reading_of(matrix, facts, track_norm(weight, before, reference, limit, key=matrix.name))
    return reading_of(matrix, facts, estimate_norm(weight, key=matrix.name, limit=limit))


def no_bulk(matrix: WeightMatrix, reason: str) -> BulkReading:
    """Spikes that were not counted, and why."""
    return BulkReading(
        name=matrix.name,
        family=matrix.family,
        null="biwhitened",
        sigma_mp=None,
        edge_plus=None,
        num_spikes=None,
        num_spikes_low=None,
        num_spikes_high=None,
        spike_energy=None,
        ks_distance=None,
        top_over_edge=None,
        pure_bulk=None,
        method="none",
        reason=reason,
    )


def fit_reading(matrix: WeightMatrix, weight: torch.Tensor) -> tuple[BulkReading, BulkFit | None]:
    """Exact spikes of one matrix; a reason instead where the matrix has no spectrum to fit."""
    try:
        fit = fit_bulk(weight, name=matrix.name)
    except InputError as error:
        return no_bulk(matrix, str(error)), None
    return _of_fit(matrix, fit), fit


def _of_fit(matrix: WeightMatrix, fit: BulkFit) -> BulkReading:
    return BulkReading(
        name=matrix.name,
        family=matrix.family,
        null=fit.null,
        sigma_mp=fit.sigma_mp,
        edge_plus=fit.edge_plus,
        num_spikes=fit.num_spikes,
        num_spikes_low=fit.num_spikes,
        num_spikes_high=fit.num_spikes,
        spike_energy=fit.spike_energy,
        ks_distance=fit.ks_distance,
        top_over_edge=float(fit.singular_values[0]) / fit.edge_plus if fit.edge_plus else None,
        pure_bulk=is_pure_bulk(fit),
        method=fit.method,
    )


def read_bulk(
    matrix: WeightMatrix, weight: torch.Tensor, before: torch.Tensor | None, fit: BulkFit | None
) -> tuple[BulkReading, BulkFit | None]:
    """Bound the spike count by Weyl's inequality from the last exact fit; fit again where there is none."""
    if fit is None or before is None or before.shape != weight.shape or fit.row_scale is None:
        return fit_reading(matrix, weight)
    delta = delta_norm_bound(weight, before, key=matrix.name, row_scale=fit.row_scale, col_scale=fit.col_scale)
    return bound_reading(matrix, fit, delta), None


def bound_reading(matrix: WeightMatrix, fit: BulkFit, delta: float) -> BulkReading:
    """Spikes after a change whose whitened norm is at most `delta`, from the fit before it.

    What a bound does not give is None, however small the change: a value that appeared below some `delta` would
    appear for one process and not for many, whose bounds differ in their last digits.
    """
    low, high = bound_num_spikes(fit, delta)
    return replace(
        _of_fit(matrix, fit),
        num_spikes_low=low,
        num_spikes_high=high,
        spike_energy=None,
        ks_distance=None,
        top_over_edge=None,
        method=f"weyl-bound({fit.method})",
    )
