"""The picture of a sweep: what is still recited against what the clean text costs, one line a kind of edit."""

from __future__ import annotations

import io
from collections.abc import Sequence

from weightproof.edits.kfac_sweep import SweepRow
from weightproof.reporting.plots import BLUE, DPI, GREEN, INK, ORANGE, PURPLE, RED

# A rise below this is drawn here: the axis is logarithmic.
_LEAST = 1e-4

_COLOURS = (BLUE, GREEN, PURPLE, ORANGE, RED, INK)


def sweep_png(rows: Sequence[SweepRow], forgotten: str = "recall", kept: str = "clean NLL") -> bytes:
    """PNG bytes.

    Args:
        rows: Of `sweep`, the base first.
        forgotten: Metric of the vertical axis, a share.
        kept: Metric of which the rise above the base is the horizontal axis, nats per token.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    base = rows[0]
    axis.plot(_LEAST, 100 * base.metrics[forgotten], "*", color=INK, markersize=14, label="unedited", clip_on=False)
    for colour, label in zip(_COLOURS * len(rows), dict.fromkeys(row.edit for row in rows[1:]), strict=False):
        line = [row for row in rows if row.edit == label]
        costs = [max(_LEAST, row.metrics[kept] - base.metrics[kept]) for row in line]
        shares = [100 * row.metrics[forgotten] for row in line]
        axis.plot(costs, shares, "o-", color=colour, label=label, linewidth=1.5, markersize=5)
        for row, cost, share in zip(line, costs, shares, strict=True):
            axis.annotate(f"{row.energy:g}", (cost, share), (4, 4), textcoords="offset points", fontsize=8, color=INK)
    axis.set_xscale("log")
    axis.set_xlabel(f"rise of the {kept}, nats per token (lower is better; {_LEAST:g} or less at the left end)")
    axis.set_ylabel(f"{forgotten}, % (lower is better)")
    axis.set_title("what an edit makes a model forget, and what it costs; numbers: energy kept", fontsize=10)
    axis.set_ylim(-4, 104)
    axis.grid(alpha=0.3)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
