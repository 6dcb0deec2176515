"""Four panels of a health report, as a PNG: norms, gradients, agreement, use of the blocks."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from weightproof.diagnostics.report import HealthReport, Layers, Status
from weightproof.reporting.plots import BLUE, DPI, GREEN, INK, ORANGE, RED, SKY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["health_png"]

_COLOURS = {Status.PASS: GREEN, Status.WARN: ORANGE, Status.FAIL: RED, Status.INVALID: RED, Status.SKIPPED: "#777777"}
_MOST_TICKS = 12


def health_png(report: HealthReport) -> bytes:
    """The picture of a report.

    Args:
        report: Of any source; panels of what was not measured say why.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 7.2), dpi=DPI, layout="constrained", facecolor="white")
    grid = figure.subplots(2, 2)
    _norms(grid[0, 0], report)
    _gradients(grid[0, 1], report)
    _agreement(grid[1, 0], report)
    _depth(grid[1, 1], report)
    head = f"{report.method_name}: {report.verdict}" if report.method_name else report.verdict
    figure.suptitle(head, fontsize=12, x=0.01, ha="left", color=_COLOURS[report.overall])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _norms(axis: Axes, report: HealthReport) -> None:
    _title(axis, report, "scale of the residual stream", ("residual_growth", "total_growth", "collapse"))
    if not _line(axis, report.residual_norms, BLUE, "median token norm"):
        _say(axis, report.diagnostics["residual_growth"].message)
        return
    _line(axis, report.residual_maxima, SKY, "largest token norm", style=":")
    failed = report.diagnostics["residual_growth"]
    if failed.location in report.layers and failed.status is not Status.PASS:
        axis.axvline(report.layers.index(str(failed.location)), color=RED, lw=1.0, alpha=0.6)
    _axes(axis, report, "norm")


def _gradients(axis: Axes, report: HealthReport) -> None:
    _title(axis, report, "gradient of the summed loss at a token", ("gradient_floor", "gradient_underflow"))
    if not _line(axis, report.bp_grad_norms, BLUE, "median gradient norm"):
        _say(axis, report.diagnostics["gradient_floor"].message)
        return
    _line(axis, report.diagnostics["scale_product"].per_layer, SKY, "times the residual norm", style=":")
    axis.axhline(report.limits.gradient_floor, color=RED, lw=1.0, ls="--", label="floor")
    _axes(axis, report, "norm", legend=0.12)  # above the floor, below the curves


def _agreement(axis: Axes, report: HealthReport) -> None:
    _title(axis, report, "agreement of the gradients of two samples", ("stability",))
    one = report.diagnostics["stability"]
    xs, ys = _points(one.per_layer)
    if not xs:
        _say(axis, one.message)
        return
    axis.plot(xs, ys, "o-", color=BLUE, ms=3.5, lw=1.2, label="mean cosine")
    if one.interval is not None and one.location in report.layers:
        at = report.layers.index(str(one.location))
        axis.plot([at, at], one.interval, color=INK, lw=2.0, label="95 % interval")
    if one.threshold is not None:
        words = f"{report.limits.stability:g} for batches of {report.limits.stability_rows}"
        axis.axhline(one.threshold, color=RED, lw=1.0, ls="--", label=words)
    axis.axhline(0.0, color=INK, lw=0.6)
    _axes(axis, report, "cosine", log=False)


def _depth(axis: Axes, report: HealthReport) -> None:
    _title(axis, report, "use of the blocks", ("depth_utility",))
    one = report.diagnostics["depth_utility"]
    xs, ys = _points(one.per_layer)
    if not xs:
        _say(axis, one.message)
        return
    axis.bar(xs, ys, color=BLUE, width=0.6 if len(xs) > 1 else 0.3)
    if one.interval is not None:
        at = max(range(len(xs)), key=ys.__getitem__)
        axis.plot([xs[at], xs[at]], one.interval, color=INK, lw=2.0, label="95 % interval")
    if one.threshold is not None:
        axis.axhline(one.threshold, color=RED, lw=1.0, ls="--", label=f"margin {one.threshold:g}")
    axis.axhline(0.0, color=INK, lw=0.6)
    if len(xs) == 1:
        axis.set_xlim(-1, 1)
        axis.set_xticks([0], ["all blocks"])
    else:
        axis.set_xticks(range(0, len(one.per_layer), -(-len(one.per_layer) // _MOST_TICKS)))
        axis.set_xlabel("block that is left out")
    axis.set_ylabel("better by")
    _tidy(axis)


def _title(axis: Axes, report: HealthReport, words: str, names: Sequence[str]) -> None:
    """What is shown, and the worst status of the diagnostics that it shows."""
    order = [Status.INVALID, Status.FAIL, Status.WARN, Status.PASS, Status.SKIPPED]
    found = min((report.diagnostics[name].status for name in names), key=order.index)
    axis.set_title(f"{words}: {found}", loc="left", fontsize=10, color=_COLOURS[found])


def _line(axis: Axes, values: Layers, colour: str, label: str, *, style: str = "-") -> bool:
    """Draw positive finite numbers; whether there was one."""
    xs, ys = _points(values)
    if not xs:
        return False
    axis.plot(xs, ys, style, marker="o", color=colour, ms=3.5, lw=1.2, label=label)
    return True


def _points(values: Layers) -> tuple[list[int], list[float]]:
    known = [(index, value) for index, value in enumerate(values) if value is not None and math.isfinite(value)]
    return [index for index, _ in known], [value for _, value in known]


def _axes(axis: Axes, report: HealthReport, what: str, *, log: bool = True, legend: float | None = None) -> None:
    if log:
        axis.set_yscale("log")
    count = len(report.layers)
    step = -(-count // _MOST_TICKS)
    chosen = list(range(0, count, step))
    axis.set_xticks(chosen, [_short(report.layers[index]) for index in chosen], rotation=30, ha="right")
    axis.set_xlim(-0.5, count - 0.5)
    axis.set_ylabel(what)
    _tidy(axis, legend)


def _short(name: str) -> str:
    """`model.layers.3` as `layers.3`: the list and the number of a block."""
    stem, _, rest = name.partition(" ")
    parts = stem.split(".")
    side = next((part[:3] + "." for part in parts if part in ("encoder", "decoder")), "")
    return side + ".".join(parts[-2:]) + (f" {rest}" if rest else "")


def _say(axis: Axes, message: str) -> None:
    """Why there is nothing to draw."""
    import textwrap

    axis.text(0.5, 0.5, "\n".join(textwrap.wrap(message, 46)), ha="center", va="center", fontsize=9, color=INK)
    axis.set_xticks([])
    axis.set_yticks([])
    for side in axis.spines.values():
        side.set_color("#CCCCCC")


def _tidy(axis: Axes, legend: float | None = None) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.tick_params(labelsize=8, colors=INK)
    axis.grid(visible=True, axis="both", color="#E6E6E6", lw=0.6)
    axis.set_axisbelow(True)
    if axis.get_legend_handles_labels()[0]:
        if legend is None:
            axis.legend(fontsize=8, frameon=False)
        else:
            axis.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1.0, legend))
    low, high = axis.get_ylim()
    if axis.get_yscale() == "log" and np.isfinite([low, high]).all() and high / low < 10:
        axis.set_ylim(low / 2, high * 2)
