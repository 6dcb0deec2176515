"""Every edit as a point: what it truly costs against what one statistic says of it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from weightproof.reporting.plots import BLUE, DPI, GREEN, INK, ORANGE, RED

PANELS = (
    ("spectral/log_spectral_norm_ratio", "weights: top singular value", "|log ratio|, largest of all matrices"),
    ("circuits/relative_distance", "weights: heads and neurons", "relative distance, largest of all layers"),
    ("divergence/kl, random windows", "outputs: random tokens, no data", "KL to the model before, nats per token"),
    ("loss/difference", "loss on your data", "rise of the loss, nats per token"),
)
COLOURS = {"harmful": RED, "grey": ORANGE, "benign": BLUE, "preserving": GREEN}
LOWEST_X, LOWEST_Y, HIGHEST = 1e-6, 1e-4, 30.0


def picture(points: Sequence[dict[str, Any]], tau: float) -> bytes:
    """Four panels as a PNG; what is zero lies on the axis, what is not finite on the far side."""
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharey=True)
    for axis, (statistic, title, label) in zip(axes.flat, PANELS, strict=True):
        for kind, colour in COLOURS.items():
            chosen = [one for one in points if _kind(one) == kind]
            axis.scatter(
                [_within(one[statistic], LOWEST_X) for one in chosen],
                [_within(one["delta"], LOWEST_Y) for one in chosen],
                s=9, alpha=0.55, linewidths=0, color=colour, label=f"{kind} ({len(chosen)})",
            )  # fmt: skip
        axis.axhline(tau, color=INK, linewidth=0.8, linestyle="--")
        axis.set(xscale="log", yscale="log", xlim=(LOWEST_X / 2, HIGHEST * 2), ylim=(LOWEST_Y / 2, HIGHEST * 2))
        axis.set_title(title, fontsize=10, color=INK)
        axis.set_xlabel(label, fontsize=9)
        axis.tick_params(labelsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("true rise of the loss, nats per token", fontsize=9)
    axes[1, 1].text(LOWEST_X * 2, tau * 1.2, "harm begins", fontsize=8, color=INK)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False, markerscale=2
    )
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI)
    return out.getvalue()


def _kind(point: dict[str, Any]) -> str:
    return "preserving" if point["group"] == "preserving" and point["truth"] == "benign" else point["truth"]


def _within(value: float | str, lowest: float) -> float:
    return HIGHEST if isinstance(value, str) else min(HIGHEST, max(lowest, value))
