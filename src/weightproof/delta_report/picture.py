"""The picture of a subspace table: R on activations and on weights, what writes (and is mixed) beside what reads."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from weightproof.delta_report.table import Row, Table
from weightproof.reporting.plots import BLUE, DPI, GREEN, INK, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FLOORS = (0.5, 0.2, 0.1, 0.05)
"""Left ends of the axis, which is logarithmic: what is below the last is drawn there, as an arrow."""
_ROW = 0.205  # inches
_LEGEND_ROWS = 6
_PALE, _SHADE = "#8A8A8A", "#E4E4E4"


def table_png(table: Table, title: str) -> bytes:
    """PNG bytes: one line a candidate, the best on top, ceilings below.

    Args:
        table: What was measured.
        title: What the change is, and of which model.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ceilings = table.of("ceiling")
    panels = (
        ("what writes to the stream, and what is mixed", table.of("write", "mixed"), ceilings),
        ("what reads from the stream", table.of("read"), ()),
    )
    tallest = max(len(panels[0][1]) + len(ceilings), len(panels[1][1]) + _LEGEND_ROWS)
    figure = Figure(figsize=(13.2, 1.5 + _ROW * tallest), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    floor = _floor(table)
    for axis, (name, rows, below) in zip(axes, panels, strict=True):
        _panel(axis, (floor, table.most), rows, below)
        axis.set_ylim(tallest - 0.4, -0.6)  # rows of one height in both
        axis.set_title(name, loc="left", fontsize=10.5, color=INK)
    _legend(axes[1], table)
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _floor(table: Table) -> float:
    """The largest left end with every score above it."""
    values = [value for row in table.rows for value in (row.r_act_low, row.r_act, row.r_weights) if value is not None]
    values += [1.0 - 2.0 * row.null_weights for row in table.rows if row.null_weights is not None]
    return next((floor for floor in _FLOORS if min(values, default=1.0) >= floor), _FLOORS[-1])


def _panel(axis: Axes, ends: tuple[float, float], rows: Sequence[Row], ceilings: Sequence[Row]) -> None:
    """One panel; `ends` are the left end of its axis and d / r."""
    (floor, most), drawn = ends, [*rows, *ceilings]
    right = max(2.0, most) * 1.25
    for place, row in enumerate(drawn):
        _line(axis, place, row, floor)
    if ceilings and rows:
        axis.axhline(len(rows) - 0.5, color=_PALE, lw=0.8)
    axis.axvline(1.0, color=INK, lw=1.0, zorder=1)
    axis.axvline(most, color=GREEN, lw=1.0, ls="--", zorder=1)
    axis.set_xscale("log")
    axis.set_xlim(floor * 0.9, right)
    ticks = [tick for tick in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if floor <= tick <= right]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_yticks(range(len(drawn)), [row.name for row in drawn], fontsize=8.5)
    axis.set_xlabel("R: how many times what a random subspace holds (1 by chance)", fontsize=9)
    axis.tick_params(labelsize=8.5, colors=INK, length=0)
    axis.grid(visible=True, axis="x", color="#E6E6E6", lw=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _line(axis: Axes, place: int, row: Row, floor: float) -> None:
    """Chance as a grey bar of two standard deviations, then both scores, joined."""
    if row.null_weights is not None:
        low = max(floor, 1.0 - 2.0 * row.null_weights)
        axis.barh(place, 1.0 + 2.0 * row.null_weights - low, left=low, height=0.72, color=_SHADE, lw=0, zorder=0)
    values = [max(floor, value) for value in (row.r_act, row.r_weights) if value is not None]
    if len(values) == 2:
        axis.plot(values, [place, place], color=_PALE, lw=0.9, zorder=2)
    if row.r_act_low is not None and row.r_act_high is not None:
        ends = [max(floor, row.r_act_low), max(floor, row.r_act_high)]
        axis.plot(ends, [place, place], color=BLUE, lw=2.6, alpha=0.35, zorder=2, solid_capstyle="butt")
    for value, colour, shape in ((row.r_act, BLUE, "o"), (row.r_weights, ORANGE, "D")):
        if value is not None:
            marker = shape if value >= floor else "<"
            axis.plot(max(floor, value), place, marker, color=colour, ms=5.2, mew=0, zorder=3)


def _legend(axis: Axes, table: Table) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries: list[Line2D | Patch] = []
    if table.num_prompts:
        what = f"on activations ({table.num_prompts} prompts; bar: 95 % interval)"
        entries.append(Line2D([], [], color=BLUE, marker="o", lw=2.6, alpha=0.8, label=what))
    if any(row.r_weights is not None for row in table.rows):
        entries.append(Line2D([], [], color=ORANGE, marker="D", lw=0, label="on weights, balanced over matrices"))
        entries.append(Patch(color=_SHADE, label="chance on weights at one layer: 1 \u00b1 two standard deviations"))
    most = f"the most there is at rank {table.rank}: d / r = {table.most:g}"
    entries.append(Line2D([], [], color=GREEN, ls="--", label=most))
    axis.legend(handles=entries, loc="lower left", fontsize=9, framealpha=1.0, edgecolor="white", labelspacing=0.8)
