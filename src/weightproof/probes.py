"""Measure: model -> frozen readings. Nothing here judges and nothing here writes.

`read_state` reads everything (the baseline). `read_change` reads only what a change touched, by
the cheapest route that settles the question: tensors by bitwise comparison with the snapshot,
spectral norms by the delta ladder, spike counts by Weyl's inequality, exact spectra only where
those leave the answer open.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm

from weightproof.contracts import relative_change
from weightproof.errors import BaselineError, InputError
from weightproof.marchenko_pastur import bound_num_spikes, fit_bulk, is_pure_bulk
from weightproof.snapshot import Snapshot, model_digest, tensor_digest
from weightproof.spectrum import (
    NormReference,
    delta_norm_bound,
    estimate_norm,
    measure_spectrum,
    profile,
    track_norm,
)
from weightproof.types import (
    BulkFit,
    BulkReading,
    MatrixReading,
    NamedTensor,
    Readings,
    TensorReading,
    WeightMatrix,
)
from weightproof.weights import iter_tensors, iter_weight_matrices, read_structure


@dataclass(frozen=True)
class State:
    """Readings of one moment with the fits behind them (`fits` only where counted exactly)."""

    readings: Readings
    fits: Mapping[str, BulkFit] = field(default_factory=dict)


@dataclass(frozen=True)
class ChangeScope:
    """How closely to look at a change.

    Attributes:
        norm_band: Family -> half-width, in log units, of the band around the baseline's spectral
            norm that the ladder must decide.
        count_slack: Family and its spike count -> how many spikes Weyl bounds may leave open in the
            whole family before spectra are taken.
        bulk_names: Matrices whose spike count is refreshed (None: every changed one).
        changed: Names of the tensors that changed.
        stray: Those whose state in the snapshot is not the one last read: no delta to start from.
    """

    norm_band: Callable[[str], float]
    count_slack: Callable[[str, int], int]
    bulk_names: Collection[str] | None
    changed: frozenset[str]
    stray: frozenset[str] = frozenset()


def count_nonfinite(tensor: torch.Tensor) -> int:
    """Number of NaN and inf elements; one read when there are none."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0:
        return 0
    if tensor.itemsize == 1:
        tensor = tensor.to(torch.bfloat16)  # holds every 8-bit float; those have no arithmetic of their own
    low, high = torch.aminmax(tensor) if not tensor.is_complex() else torch.aminmax(torch.view_as_real(tensor))
    if bool(torch.isfinite(low)) and bool(torch.isfinite(high)):
        return 0
    return int(tensor.numel() - torch.isfinite(tensor).sum())


def read_tensor(named: NamedTensor) -> TensorReading:
    """Exact facts about one parameter or buffer.

    Raises:
        BaselineError: If it has no values in memory (meta device) or is not dense.
    """
    tensor = named.tensor.detach()
    if tensor.is_meta or tensor.layout != torch.strided:
        raise BaselineError(
            f"{named.name} holds no dense values ({tensor.device}, {tensor.layout}): load the weights into memory, "
            "as dense tensors, before they are guarded"
        )
    num_nonfinite = count_nonfinite(tensor)
    return TensorReading(
        name=named.name,
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        storage=type(tensor).__name__,
        is_buffer=named.is_buffer,
        num_nonfinite=num_nonfinite,
        digest=tensor_digest(tensor),
        num_nan=int(torch.isnan(tensor).sum()) if num_nonfinite else 0,
    )


def read_tensors(
    model: torch.nn.Module, known: Mapping[str, TensorReading], changed: Collection[str]
) -> dict[str, TensorReading]:
    """Read every tensor that is in `changed` or not in `known`; reuse the readings of the rest."""
    return {
        named.name: known[named.name] if named.name in known and named.name not in changed else read_tensor(named)
        for named in iter_tensors(model)
    }


def digest_of(tensors: Mapping[str, TensorReading]) -> str:
    """Digest of the model that these readings describe."""
    return model_digest({name: reading.digest for name, reading in tensors.items()})


def read_state(
    model: torch.nn.Module, tensors: Mapping[str, TensorReading] | None = None, *, progress: bool = False
) -> State:
    """Read every tensor (unless given as `tensors`, just read), matrix and spectrum of a model exactly."""
    tensors = read_tensors(model, {}, ()) if tensors is None else tensors
    matrices: dict[str, MatrixReading] = {}
    bulks: dict[str, BulkReading] = {}
    fits: dict[str, BulkFit] = {}
    every = list(iter_weight_matrices(model))
    for matrix in tqdm(every, desc="spectra", unit="matrix", disable=not progress, leave=False, delay=1.0):
        matrices[matrix.name] = _read_matrix_exactly(matrix)
        bulks[matrix.name], fit = _fit_reading(matrix)
        if fit is not None:
            fits[matrix.name] = fit
    return State(_readings(model, tensors, matrices, bulks), fits)


def read_change(
    model: torch.nn.Module, snapshot: Snapshot, current: State, baseline: State, scope: ChangeScope
) -> State:
    """Read a changed model; what did not change keeps its reading of `current`."""
    tensors = read_tensors(model, current.readings.tensors, scope.changed)
    matrices: dict[str, MatrixReading] = {}
    bulks: dict[str, BulkReading] = {}
    fits: dict[str, BulkFit] = {}
    for matrix in iter_weight_matrices(model):
        name = matrix.name
        known = current.readings.matrices.get(name)
        unchanged = current if known is not None and matrix.tensor_name not in scope.changed else None
        if unchanged is None and _is_as_in(baseline.readings, matrix, tensors):
            unchanged = baseline  # an earlier change was undone
        if unchanged is not None:
            matrices[name] = unchanged.readings.matrices[name]
            bulks[name] = unchanged.readings.bulks[name]
            if name in unchanged.fits:
                fits[name] = unchanged.fits[name]
            continue
        tracked = known is not None and matrix.tensor_name not in scope.stray
        before = snapshot.original_matrix(matrix) if tracked else None
        matrices[name] = _read_matrix(matrix, before, known, baseline.readings.matrices.get(name), scope)
        if scope.bulk_names is not None and name not in scope.bulk_names and name in current.readings.bulks:
            bulks[name] = current.readings.bulks[name]
            continue
        reason = matrices[name].reason
        bulks[name], fit = (
            (_no_bulk(matrix, reason), None) if reason else _read_bulk(matrix, before, current.fits.get(name))
        )
        if fit is not None:
            fits[name] = fit
    unsettled = _open_counts(bulks, scope)
    for matrix in iter_weight_matrices(model):
        if matrix.name in unsettled:
            bulks[matrix.name], fit = _fit_reading(matrix)
            if fit is not None:
                fits[matrix.name] = fit
    return State(_readings(model, tensors, matrices, bulks), fits)


def _readings(
    model: torch.nn.Module,
    tensors: Mapping[str, TensorReading],
    matrices: Mapping[str, MatrixReading],
    bulks: Mapping[str, BulkReading],
) -> Readings:
    return Readings(
        model_digest=digest_of(tensors),
        tensors=tensors,
        structure=read_structure(model),
        matrices=matrices,
        bulks=bulks,
        unmeasured={} if matrices else {"matrices": "the model has no weight matrix"},
        untrained=untrained_names(matrices, bulks),
    )


def _is_as_in(readings: Readings, matrix: WeightMatrix, tensors: Mapping[str, TensorReading]) -> bool:
    """Whether a matrix is bit for bit, and oriented, as it was when `readings` were taken."""
    then, known = readings.tensors.get(matrix.tensor_name), readings.matrices.get(matrix.name)
    if then is None or known is None or then.digest != tensors[matrix.tensor_name].digest:
        return False
    return (known.d_out, known.d_in) == (matrix.d_out, matrix.d_in)


def _open_counts(bulks: Mapping[str, BulkReading], scope: ChangeScope) -> frozenset[str]:
    """Matrices whose spectrum must be taken so that no family's spike count is left too open.

    Widest intervals first: those settle most for one spectrum.
    """
    chosen: set[str] = set()
    for family in {bulk.family for bulk in bulks.values()}:
        members = [bulk for bulk in bulks.values() if bulk.family == family and bulk.num_spikes is not None]
        widths = {bulk.name: (bulk.num_spikes_high or 0) - (bulk.num_spikes_low or 0) for bulk in members}
        left = sum(widths.values())
        slack = scope.count_slack(family, sum(bulk.num_spikes or 0 for bulk in members))
        for name in sorted(widths, key=lambda key: widths[key], reverse=True):
            if left <= slack:
                break
            chosen.add(name)
            left -= widths[name]
    return frozenset(chosen)


def untrained_names(matrices: Mapping[str, MatrixReading], bulks: Mapping[str, BulkReading]) -> frozenset[str]:
    """Matrices that carry no learned structure yet: zero, pure bulk, or without a spectrum."""
    return frozenset(
        name for name, reading in matrices.items() if not reading.frobenius_norm or bulks[name].pure_bulk is not False
    )


def looks_untrained(readings: Readings) -> bool:
    """True when spectra were measured and every one of them is a pure Marchenko-Pastur bulk."""
    known = [bulk.pure_bulk for bulk in readings.bulks.values() if bulk.pure_bulk is not None]
    return bool(known) and all(known)


def relative_delta(after: torch.Tensor, before: torch.Tensor | None) -> float | None:
    """||after - before||_F / ||before||_F; None when undefined (nothing to compare with, or all zeros)."""
    return None if before is None or before.shape != after.shape else relative_change(before, after)


def _refused(matrix: WeightMatrix, method: str, reason: str) -> MatrixReading:
    return MatrixReading(
        matrix.name, matrix.family, matrix.d_out, matrix.d_in, None, None, None, None, None, None, method, reason
    )


def _read_matrix_exactly(matrix: WeightMatrix) -> MatrixReading:
    if matrix.refusal:
        return _refused(matrix, "refused", matrix.refusal)
    weight = matrix.load()
    facts = profile(weight)
    if facts.num_nonfinite:
        return _refused(matrix, "profile", f"{facts.num_nonfinite} values are NaN or inf")
    spectrum = measure_spectrum(weight, name=matrix.name)
    return MatrixReading(
        name=matrix.name,
        family=matrix.family,
        d_out=matrix.d_out,
        d_in=matrix.d_in,
        frobenius_norm=facts.frobenius_norm,
        spectral_norm=spectrum.spectral_norm,
        spectral_norm_error=spectrum.spectral_norm_error,
        norm_collapse=facts.norm_collapse,
        zero_rows=facts.zero_rows,
        zero_cols=facts.zero_cols,
        method=spectrum.method,
    )


def _read_matrix(
    matrix: WeightMatrix,
    before: torch.Tensor | None,
    known: MatrixReading | None,
    base: MatrixReading | None,
    scope: ChangeScope,
) -> MatrixReading:
    """The delta ladder where a previous state is at hand, a Lanczos estimate where it is not."""
    if matrix.refusal:
        return _refused(matrix, "refused", matrix.refusal)
    weight = matrix.load()
    facts = profile(weight)
    if facts.num_nonfinite:
        return _refused(matrix, "profile", f"{facts.num_nonfinite} values are NaN or inf")
    if base is None or not base.spectral_norm:
        return _read_matrix_exactly(matrix)
    factor = math.exp(scope.norm_band(matrix.family))
    # What is not known of the baseline is taken off the band, so that the ratio's whole interval is decided.
    doubt = base.spectral_norm_error or 0.0
    limit = ((base.spectral_norm + doubt) / factor, (base.spectral_norm - doubt) * factor)
    if limit[0] >= limit[1]:
        return _read_matrix_exactly(matrix)
    trackable = before is not None and before.shape == weight.shape and known is not None and known.spectral_norm
    if trackable and before is not None and known is not None:
        reference = NormReference(known.spectral_norm or 0.0, known.spectral_norm_error or 0.0)
        norm = track_norm(weight, before, reference, limit, key=matrix.name)
    else:
        norm = estimate_norm(weight, key=matrix.name, limit=limit)
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


def _no_bulk(matrix: WeightMatrix, reason: str) -> BulkReading:
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


def _fit_reading(matrix: WeightMatrix) -> tuple[BulkReading, BulkFit | None]:
    """Exact spikes of one matrix; a reason instead where the matrix has no spectrum to fit."""
    if matrix.refusal:
        return _no_bulk(matrix, matrix.refusal), None
    try:
        fit = fit_bulk(matrix.load(), name=matrix.name)
    except InputError as error:
        return _no_bulk(matrix, str(error)), None
    top = float(fit.singular_values[0]) / fit.edge_plus if fit.edge_plus else None
    reading = BulkReading(
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
        top_over_edge=top,
        pure_bulk=is_pure_bulk(fit),
        method=fit.method,
    )
    return reading, fit


def _read_bulk(
    matrix: WeightMatrix, before: torch.Tensor | None, fit: BulkFit | None
) -> tuple[BulkReading, BulkFit | None]:
    """Bound the spike count by Weyl's inequality from the last exact fit; fit again where there is none."""
    weight = matrix.load()
    if fit is None or before is None or before.shape != weight.shape or fit.row_scale is None:
        return _fit_reading(matrix)
    delta = delta_norm_bound(weight, before, key=matrix.name, row_scale=fit.row_scale, col_scale=fit.col_scale)
    low, high = bound_num_spikes(fit, delta)
    top = float(fit.singular_values[0])
    return (
        BulkReading(
            name=matrix.name,
            family=matrix.family,
            null=fit.null,
            sigma_mp=fit.sigma_mp,
            edge_plus=fit.edge_plus,
            num_spikes=fit.num_spikes,
            num_spikes_low=low,
            num_spikes_high=high,
            spike_energy=None,
            ks_distance=None,
            top_over_edge=top / fit.edge_plus if fit.edge_plus and delta <= 1e-3 * top else None,
            pure_bulk=is_pure_bulk(fit),
            method=f"weyl-bound({fit.method})",
        ),
        None,
    )
