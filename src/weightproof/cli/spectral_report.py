"""What `weightproof inspect` measures: spectra, noise fit and weight distribution of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from statistics import median

import torch

from weightproof.errors import InputError
from weightproof.marchenko_pastur import fit_bulk, is_pure_bulk
from weightproof.spectrum import measure_spectrum
from weightproof.types import BulkFit, WeightMatrix

FORMAT = "weightproof-inspect-v1"
CHUNK = 1 << 22
"""Elements promoted to float64 at a time."""


@dataclass(frozen=True, slots=True)
class WeightMoments:
    """Distribution of the finite elements: standard deviation, fraction of exact zeros, excess kurtosis.

    `kurtosis` is m4 / m2^2 - 3 (0 for a Gaussian), None for a constant matrix.
    """

    std: float
    sparsity: float
    kurtosis: float | None
    num_nonfinite: int


@dataclass(frozen=True, slots=True)
class MatrixReport:
    """One matrix; every number is None with a `reason` where it could not be measured.

    Norms are in the units of the weights; `sigma_mp`, `edge_plus` and `threshold` are in the units
    of the spectrum that `null` names. `alpha_tail` is the number k of eigenvalues in the power-law
    tail: alpha_error = (alpha - 1) / sqrt(k).
    """

    name: str
    family: str
    d_out: int
    d_in: int
    dtype: str
    tied_names: tuple[str, ...]
    null: str
    spectral_norm: float | None = None
    spectral_norm_error: float | None = None
    frobenius_norm: float | None = None
    stable_rank: float | None = None
    effective_rank: float | None = None
    alpha: float | None = None
    alpha_error: float | None = None
    alpha_tail: int | None = None
    sigma_mp: float | None = None
    edge_plus: float | None = None
    threshold: float | None = None
    top_over_edge: float | None = None
    num_spikes: int | None = None
    spike_energy: float | None = None
    ks_distance: float | None = None
    pure_bulk: bool | None = None
    std: float | None = None
    sparsity: float | None = None
    kurtosis: float | None = None
    num_nonfinite: int | None = None
    reason: str | None = None

    @property
    def is_measured(self) -> bool:
        """Whether the spectrum is known."""
        return self.spectral_norm is not None


@dataclass(frozen=True, slots=True)
class FamilyReport:
    """Medians over the measured matrices of one family; None where nothing was measured."""

    family: str
    matrices: int
    measured: int
    pure_bulk: int
    num_spikes: int
    spectral_norm: float | None
    frobenius_norm: float | None
    stable_rank: float | None
    alpha: float | None
    std: float | None
    sparsity: float | None
    kurtosis: float | None


@dataclass(frozen=True, slots=True, eq=False)
class SpectralReport:
    """All matrices of a model, in its own order, and the fits their pictures are drawn from."""

    model: str
    null: str
    matrices: tuple[MatrixReport, ...]
    fits: tuple[tuple[str, BulkFit], ...]

    @property
    def measured(self) -> tuple[MatrixReport, ...]:
        """Matrices whose spectrum is known."""
        return tuple(matrix for matrix in self.matrices if matrix.is_measured)

    @property
    def refused(self) -> tuple[MatrixReport, ...]:
        """Matrices enumerated but not measured; each carries its reason."""
        return tuple(matrix for matrix in self.matrices if not matrix.is_measured)

    @property
    def looks_untrained(self) -> bool:
        """Whether every fitted spectrum is a pure Marchenko-Pastur bulk: no structure was learned."""
        fitted = [matrix.pure_bulk for matrix in self.measured if matrix.pure_bulk is not None]
        return bool(fitted) and all(fitted)

    @property
    def families(self) -> tuple[FamilyReport, ...]:
        """One summary a family, in order of first appearance."""
        names = dict.fromkeys(matrix.family for matrix in self.matrices)
        return tuple(_summary(name, [m for m in self.matrices if m.family == name]) for name in names)

    def to_dict(self) -> dict[str, object]:
        """Everything as plain JSON values; no NaN, no infinity."""
        return {
            "format": FORMAT,
            "model": self.model,
            "null": self.null,
            "num_eligible": len(self.matrices),
            "num_measured": len(self.measured),
            "looks_untrained": self.looks_untrained,
            "refused": [{"name": matrix.name, "reason": matrix.reason} for matrix in self.refused],
            "families": [asdict(family) for family in self.families],
            "matrices": [asdict(matrix) for matrix in self.matrices],
        }


def build_report(
    model: str, matrices: Iterable[WeightMatrix], *, null: str, limit: int | None = None
) -> SpectralReport:
    """Measure the matrices one after the other; only one is in memory at a time.

    Args:
        model: Shown as the report's title.
        matrices: As `iter_checkpoint_matrices` gives them.
        null: Null model of `fit_bulk`.
        limit: Measure at most so many; the rest is listed with a reason. None measures all.

    Raises:
        InputError: If there is no weight matrix at all.
    """
    reports: list[MatrixReport] = []
    fits: list[tuple[str, BulkFit]] = []
    for report, fit in _measure_all(matrices, null, math.inf if limit is None else limit):
        reports.append(report)
        if fit is not None:
            fits.append((report.family, fit))
    if not reports:
        raise InputError(f"{model} holds no weight matrix: is it a model checkpoint?")
    return SpectralReport(model, null, tuple(reports), tuple(fits))


def weight_moments(matrix: torch.Tensor) -> WeightMoments:
    """Moments of the elements, accumulated in float64 over pieces of the matrix.

    Args:
        matrix: Any shape, any floating dtype; NaN and inf are counted and left out.
    """
    pieces = matrix.detach().reshape(-1).split(CHUNK)
    kept = [piece.isfinite().sum().item() for piece in pieces]
    count = sum(kept)
    nonfinite = matrix.numel() - count
    if not count:
        return WeightMoments(0.0, 0.0, None, int(nonfinite))
    mean = sum(piece.double()[piece.isfinite()].sum().item() for piece in pieces) / count
    second = fourth = 0.0
    zeros = 0
    for piece in pieces:
        square = (piece.double()[piece.isfinite()] - mean).square_()
        second += square.sum().item()
        fourth += square.square_().sum().item()
        zeros += int((piece == 0).sum().item())
    variance = second / count
    kurtosis = fourth / count / variance**2 - 3.0 if variance > 0 else None
    return WeightMoments(variance**0.5, zeros / count, kurtosis, int(nonfinite))


def _measure_all(
    matrices: Iterable[WeightMatrix], null: str, limit: float
) -> Iterator[tuple[MatrixReport, BulkFit | None]]:
    done = 0
    for matrix in matrices:
        if matrix.refusal is not None:
            yield _blank(matrix, null, reason=matrix.refusal), None
        elif done >= limit:
            yield _blank(matrix, null, reason=f"beyond --limit {limit:g}"), None
        else:
            done += 1
            yield _measure(matrix, null)


def _measure(matrix: WeightMatrix, null: str) -> tuple[MatrixReport, BulkFit | None]:
    values = matrix.load()
    moments = weight_moments(values)
    if moments.num_nonfinite:
        share = f"{moments.num_nonfinite} of {values.numel()} elements are NaN or inf"
        return _blank(matrix, null, moments, reason=f"{share}: no spectrum"), None
    spectrum = measure_spectrum(values, exact=True, name=matrix.name)
    fit = fit_bulk(values, null, name=matrix.name)
    alpha, error = _finite(spectrum.alpha), _finite(spectrum.alpha_error)
    report = _blank(
        matrix,
        null,
        moments,
        spectral_norm=_finite(spectrum.spectral_norm),
        spectral_norm_error=_finite(spectrum.spectral_norm_error),
        frobenius_norm=_finite(spectrum.frobenius_norm),
        stable_rank=_finite(spectrum.stable_rank),
        effective_rank=_finite(spectrum.effective_rank),
        alpha=alpha,
        alpha_error=error,
        alpha_tail=round(((alpha - 1) / error) ** 2) if alpha is not None and error else None,
        sigma_mp=_finite(fit.sigma_mp),
        edge_plus=_finite(fit.edge_plus),
        threshold=_finite(fit.threshold),
        top_over_edge=_top_over_edge(fit),
        num_spikes=fit.num_spikes,
        spike_energy=_finite(fit.spike_energy),
        ks_distance=_finite(fit.ks_distance),
        pure_bulk=is_pure_bulk(fit),
    )
    return report, fit


def _blank(matrix: WeightMatrix, null: str, moments: WeightMoments | None = None, **values: object) -> MatrixReport:
    known: dict[str, object] = {} if moments is None else {f.name: getattr(moments, f.name) for f in fields(moments)}
    return MatrixReport(
        name=matrix.name,
        family=matrix.family,
        d_out=matrix.d_out,
        d_in=matrix.d_in,
        dtype=str(matrix.dtype).removeprefix("torch."),
        tied_names=matrix.tied_names,
        null=null,
        **known,  # pyright: ignore[reportArgumentType] - field names of the two dataclasses agree, tested
        **values,  # pyright: ignore[reportArgumentType]
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _top_over_edge(fit: BulkFit) -> float | None:
    if not len(fit.singular_values) or not fit.edge_plus > 0:
        return None
    return _finite(fit.singular_values[0].item() / fit.edge_plus)


def _summary(family: str, matrices: list[MatrixReport]) -> FamilyReport:
    measured = [matrix for matrix in matrices if matrix.is_measured]

    def middle(field: str) -> float | None:
        values = [value for matrix in measured if (value := getattr(matrix, field)) is not None]
        return median(values) if values else None

    return FamilyReport(
        family=family,
        matrices=len(matrices),
        measured=len(measured),
        pure_bulk=sum(bool(matrix.pure_bulk) for matrix in measured),
        num_spikes=sum(matrix.num_spikes or 0 for matrix in measured),
        spectral_norm=middle("spectral_norm"),
        frobenius_norm=middle("frobenius_norm"),
        stable_rank=middle("stable_rank"),
        alpha=middle("alpha"),
        std=middle("std"),
        sparsity=middle("sparsity"),
        kurtosis=middle("kurtosis"),
    )
