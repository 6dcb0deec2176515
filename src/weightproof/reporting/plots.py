"""Pictures of spectra: PNG bytes out, no global state (matplotlib's object interface, Agg).

Every picture draws singular values divided by the upper Marchenko-Pastur edge of their own fit, so
that noise ends at 1 whatever the null, the shape and the scale of the matrix were; spikes are what
lies above the threshold (edge plus Tracy-Widom allowance). Colours are those of Okabe and Ito
(2008), distinguishable with any colour vision.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from weightproof.numerics.random_matrix import mp_density
from weightproof.types import BulkFit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 130
INK, BLUE, SKY, GREEN, ORANGE, RED, PURPLE = "#222222", "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7"
NULL_WORDS = {"global": "raw", "biwhitened": "biwhitened", "signflip": "raw, sign-flip null"}
LOG_FROM = 4.0
"""From this ratio of top singular value to edge on, the axis is logarithmic."""
FLOOR = 0.03
"""Lower end of a logarithmic axis of singular values in units of the edge: zeros have no logarithm."""


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One version of a model in the picture of a decision.

    Attributes:
        label: What the version is, for example `INT8 per channel`.
        fit: Fit of the matrix that is shown; None when it could not be fitted.
        divergence: KL(base || version) in nats per token, None for the base itself.
        bits_per_byte: Held-out code length, the ground truth beside the decision.
        action: What the policy decided: KEEP, ROLLBACK or HALT; empty for the base.
    """

    label: str
    fit: BulkFit | None
    divergence: float | None
    bits_per_byte: float | None
    action: str = ""


def spectrum_png(name: str, before: BulkFit, after: BulkFit | None = None) -> bytes:
    """Histogram of the singular values of one matrix with its Marchenko-Pastur bulk, as a PNG.

    Args:
        name: Public name of the matrix, for the title.
        before: Fit of the matrix at baseline (or of the only version there is).
        after: Fit after a change; drawn below, on the same axis.
    """
    rows = [("before", before)] if after is None else [("before", before), ("after", after)]
    figure = _figure(7.4, 3.4 if after is None else 5.8)
    axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    bins, is_log = _bins([fit for _, fit in rows])
    for axis, (word, fit) in zip(axes, rows, strict=True):
        _draw_histogram(axis, fit, bins, colour=BLUE if word == "before" else GREEN)
        axis.set_title("" if after is None else word, loc="left", fontsize=10)
        axis.set_ylabel("singular values per bin")
        _legend(axis)
    _ratio_axis(axes[-1], bins, is_log, before.null)
    figure.suptitle(f"{name}  ({before.d_out} x {before.d_in})", fontsize=11, x=0.01, ha="left")
    return _png(figure)


def decision_png(matrix: str, candidates: Sequence[Candidate], limit: float) -> bytes:
    """Spectra of one matrix in several versions, and what the versions did to the outputs.

    Args:
        matrix: Public name of the matrix whose spectra are drawn.
        candidates: The base first, then the versions that were judged.
        limit: Limit of the divergence guard, nats per token.
    """
    fitted = [(candidate, candidate.fit) for candidate in candidates if candidate.fit is not None]
    figure = _figure(12.2, 6.6)
    grid = figure.add_gridspec(max(1, len(fitted)), 2, width_ratios=(1.35, 1.0))
    colours = dict(zip((candidate.label for candidate in candidates), (BLUE, GREEN, PURPLE, SKY), strict=False))
    bins, is_log = _bins([fit for _, fit in fitted])
    axis = None
    for row, (candidate, fit) in enumerate(fitted):
        axis = figure.add_subplot(grid[row, 0], sharex=axis, sharey=axis)
        _draw_histogram(axis, fit, bins, colour=colours[candidate.label])
        axis.set_title(_headline(candidate), loc="left", fontsize=10)
        axis.set_ylabel("values per bin")
        axis.tick_params(labelbottom=row == len(fitted) - 1)
        _legend(axis)
    if axis is not None:
        _ratio_axis(axis, bins, is_log, fitted[0][1].null)
    halves = grid[:, 1].subgridspec(2, 1, hspace=0.12)
    judged = [candidate for candidate in candidates if candidate.divergence is not None]
    _draw_divergence(figure.add_subplot(halves[0]), judged, limit, colours)
    _draw_code_length(figure.add_subplot(halves[1]), candidates, colours)
    figure.suptitle(f"{matrix}: spectrum, and what the change does to the outputs", fontsize=12, x=0.01, ha="left")
    return _png(figure)


def inspect_png(title: str, fits: Sequence[tuple[str, BulkFit]]) -> bytes:
    """Ordered spectra of all matrices of a model, one panel per family, against the edge.

    Args:
        title: Name of the model.
        fits: (family, fit) in model order; matrices without singular values are left out.
    """
    usable = [(family, fit) for family, fit in fits if fit.edge_plus > 0 and len(fit.singular_values)]
    families = list(dict.fromkeys(family for family, _ in usable))
    columns = min(3, max(1, math.ceil(len(families) ** 0.5)))
    rows = -(-len(families) // columns) if families else 1
    figure = _figure(4.3 * columns + 0.6, 3.1 * rows + 0.7)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axis, family in zip(axes, families, strict=False):
        _draw_family(axis, family, [fit for of, fit in usable if of == family])
    for axis in axes[len(families) :]:
        axis.set_axis_off()
    for axis in axes[: len(families) : columns]:
        axis.set_ylabel("singular value / upper edge")
    if families:
        axes[0].legend(fontsize=8, frameon=False, loc="lower left", title="dark to light: depth", title_fontsize=8)
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    return _png(figure)


def bulk_density(fit: BulkFit, values: np.ndarray) -> np.ndarray:
    """Marchenko-Pastur density of singular values s for the noise scale of `fit`; integrates to 1.

    With N = max(shape), b = aspect ratio and x = s^2 / (N sigma^2):
    f(s) = mp_density(x, b) * 2 s / (N sigma^2).
    """
    ratio = min(fit.d_out, fit.d_in) / max(fit.d_out, fit.d_in)
    scale = max(fit.d_out, fit.d_in) * fit.sigma_mp**2
    if not np.isfinite(scale) or scale <= 0:
        return np.zeros_like(values)
    return mp_density(values**2 / scale, ratio) * 2 * values / scale


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _values(fit: BulkFit) -> np.ndarray:
    """Finite singular values in units of the fit's upper edge (of their maximum, without an edge)."""
    values = fit.singular_values.double().cpu().numpy()
    values = values[np.isfinite(values)]
    unit = _unit(fit)
    return values / unit


def _unit(fit: BulkFit) -> float:
    if np.isfinite(fit.edge_plus) and fit.edge_plus > 0:
        return fit.edge_plus
    top = fit.singular_values.max().item() if len(fit.singular_values) else 0.0
    return top if np.isfinite(top) and top > 0 else 1.0


def _bins(fits: Sequence[BulkFit]) -> tuple[np.ndarray, bool]:
    """Bin edges shared by all panels, in units of the edge; logarithmic for far-reaching spectra."""
    values = [_values(fit) for fit in fits]
    top = max([1.05, *(v.max() for v in values if len(v))])
    count = int(np.clip(max([24, *(2 * len(v) ** 0.5 for v in values)]), 24, 80))
    if top < LOG_FROM:
        width = 1.0 / max(8, round(count / top))  # the edge, 1, falls between two bins
        return np.arange(0, int(top / width) + 3) * width, False
    positive = np.concatenate([v[v > 0] for v in values] or [np.ones(1)])
    floor = max(float(np.quantile(positive, 0.01)) * 0.8, top * 1e-4)
    below = max(4, round(count * np.log(1 / floor) / np.log(top / floor))) if floor < 1 else 0
    step = np.log(1 / floor) / below if below else np.log(top / floor) / count
    return floor * np.exp(step * np.arange(int(np.log(top / floor) / step) + 3)), True


def _draw_histogram(axis: Axes, fit: BulkFit, bins: np.ndarray, *, colour: str) -> None:
    values, unit = _values(fit), _unit(fit)
    is_spike = values > fit.threshold / unit
    noise, spikes = values[~is_spike], values[is_spike]
    axis.hist(
        np.clip(noise, bins[0], None), bins=bins.tolist(), color=colour, alpha=0.45, label=f"{len(noise)} in the bulk"
    )
    if len(spikes):
        axis.hist(
            spikes, bins=bins.tolist(), color=ORANGE, alpha=0.9, label=f"{len(spikes)} spikes above the threshold"
        )
        rug = axis.get_xaxis_transform()
        axis.plot(spikes, np.full(len(spikes), -0.025), "^", ms=3.5, color=ORANGE, transform=rug, clip_on=False, mew=0)
    fine = np.interp(np.linspace(0, len(bins) - 1, 600), np.arange(len(bins)), bins)
    width = np.interp(fine, 0.5 * (bins[1:] + bins[:-1]), np.diff(bins))
    expected = len(noise) * bulk_density(fit, fine * unit) * unit * width
    axis.plot(fine, expected, color=INK, lw=1.4, label=f"Marchenko-Pastur, $\\sigma$ = {fit.sigma_mp:.3g}")
    axis.axvline(fit.edge_plus / unit, color=INK, lw=1.0, ls="--", label="upper edge")
    axis.axvline(fit.threshold / unit, color=RED, lw=1.0, ls=":", label="threshold (Tracy-Widom)")
    _tidy(axis)


def _draw_divergence(axis: Axes, judged: Sequence[Candidate], limit: float, colours: Mapping[str, str]) -> None:
    """Bars of KL on a logarithmic axis, with the side on which the limit lies."""
    rows = np.arange(len(judged))[::-1]
    values = [max(candidate.divergence or 0.0, 1e-7) for candidate in judged]
    low, high = min([*values, limit]) / 6, max([*values, limit]) * 300
    widths = [value - low for value in values]
    axis.barh(rows, widths, left=low, height=0.5, color=[colours[c.label] for c in judged], alpha=0.75)
    for row, value, candidate in zip(rows, values, judged, strict=True):
        axis.text(value * 1.25, row, f"{value:.2g}  {candidate.action}", va="center", fontsize=9.5, color=INK)
    axis.axvspan(limit, high, color=RED, alpha=0.07, lw=0)
    axis.axvline(limit, color=RED, lw=1.4, ls=":")
    axis.text(limit, len(judged) - 0.42, f" limit {limit:g}", color=RED, fontsize=9, va="bottom")
    axis.set(
        xscale="log", xlim=(low, high), ylim=(-0.6, len(judged) - 0.1), xlabel="KL(base ‖ changed), nats per token"
    )
    axis.set_yticks(rows, [candidate.label for candidate in judged])
    axis.set_title("outputs against the limit (shaded: rolled back)", loc="left", fontsize=10)
    _tidy(axis)


def _draw_code_length(axis: Axes, candidates: Sequence[Candidate], colours: Mapping[str, str]) -> None:
    shown = [candidate for candidate in candidates if candidate.bits_per_byte is not None]
    rows = np.arange(len(shown))[::-1]
    values = [candidate.bits_per_byte or 0.0 for candidate in shown]
    axis.barh(rows, values, height=0.5, color=[colours[candidate.label] for candidate in shown], alpha=0.75)
    for row, value in zip(rows, values, strict=True):
        axis.text(value, row, f" {value:.3f}", va="center", fontsize=9.5, color=INK)
    axis.set_xlim(0, max([1.0, *values]) * 1.2)
    axis.set_yticks(rows, [candidate.label for candidate in shown])
    axis.set_xlabel("bits per byte of held-out text (lower is better)")
    axis.set_title("ground truth, not used for the decision", loc="left", fontsize=10)
    _tidy(axis)


def _draw_family(axis: Axes, family: str, fits: Sequence[BulkFit]) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator, NullLocator

    shades = colormaps["viridis"](np.linspace(0.05, 0.85, len(fits)))
    for shade, fit in zip(shades, fits, strict=True):
        values = np.maximum(_values(fit), FLOOR)
        axis.plot((np.arange(len(values)) + 0.5) / len(values), values, color=shade, lw=1.1, alpha=0.85)
    by_shape = {round(min(fit.d_out, fit.d_in) / max(fit.d_out, fit.d_in), 3): fit for fit in fits}
    for label, fit in zip(["pure noise of the same shape", *[""] * len(fits)], by_shape.values(), strict=False):
        ranks, values = pure_bulk_curve(fit)
        axis.plot(ranks, values, color=INK, lw=1.3, ls="--", label=label or None)
    axis.axhline(1.0, color=RED, lw=1.0, ls=":", label="upper edge")
    spikes = sum(fit.num_spikes for fit in fits)
    count = "1 matrix" if len(fits) == 1 else f"{len(fits)} matrices"
    axis.set_title(f"{family}: {count}, {spikes} {'spike' if spikes == 1 else 'spikes'}", loc="left", fontsize=10)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xlabel("rank / number of singular values")
    _tidy(axis)


def pure_bulk_curve(fit: BulkFit) -> tuple[np.ndarray, np.ndarray]:
    """Rank in 0..1 against singular value / edge of pure noise with the shape of `fit`, not below `FLOOR`."""
    # Over the whole bulk: a square matrix has mass below the floor of the axis, which counts for the ranks above it.
    grid = np.linspace(fit.edge_plus, fit.edge_minus, 2000)
    density = bulk_density(fit, grid)
    mass = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]) * -np.diff(grid))])
    return mass / max(mass[-1], 1e-12), np.maximum(grid / fit.edge_plus, FLOOR)


def _headline(candidate: Candidate) -> str:
    return f"{candidate.label}: {candidate.action}" if candidate.action else candidate.label


def _ratio_axis(axis: Axes, bins: np.ndarray, is_log: bool, null: str) -> None:
    axis.set_xlim(float(bins[0]), float(bins[-1]))
    if is_log:
        axis.set_xscale("log")
        ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if bins[0] <= t <= bins[-1]]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    axis.set_xlabel(f"singular value / upper edge of its own fit ({NULL_WORDS.get(null, null)})")


def _legend(axis: Axes) -> None:
    """Above the spikes, where the histogram is lowest."""
    axis.legend(fontsize=7.5, frameon=False, loc="upper right", handlelength=1.6)


def _tidy(axis: Axes) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.tick_params(labelsize=9, colors=INK)
    axis.grid(visible=True, axis="both", color="#E6E6E6", lw=0.6)
    axis.set_axisbelow(True)
