"""What curvature.py and equal_size.py found, as Markdown, and the picture."""

from __future__ import annotations

import io
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import spearmanr

from weightproof.reporting.plots import BLUE, DPI, GREEN, INK, ORANGE, PURPLE

KINDS = {"RTN": BLUE, "noise": ORANGE, "prune": GREEN, "SVD": PURPLE}
# In plans of equal size: whose loss is divided by whose.
OURS, NORM = "curvature", "squared Frobenius error"
BINS = (0.0, 1e-3, 1e-2, 1e-1, math.inf)
# By matrix: with the eigenvalues of EK-FAC where "corrected", with labels of the data where "empirical", and two norms
# that know nothing of the data.
WAYS = ("curvature", "corrected", "empirical", "squared norm", "relative norm")
# Of a whole edit: with the mean gradient as a first-order term, and with gradients of whole windows in place of
# factors, which leave out no coupling between matrices or tokens.
WHOLE_WAYS = ("gradient", "coupled")


def rank_correlation(rows: Sequence[Mapping[str, Any]], way: str, measure: str) -> float:
    """Spearman's."""
    return float(spearmanr([row["predicted"][way] for row in rows], [row[measure] for row in rows]).statistic)


def summary(rows: Sequence[Mapping[str, Any]], blame: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Correlations, measured over predicted by size, and top-1 blame."""
    groups: dict[str, Any] = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        whole = [row for row in own if row["matrix"] is None]
        single = [row for row in own if row["matrix"] is not None]
        for label, chosen in (("all", own), ("whole model", whole), ("one matrix", single)):
            found = {way: [rank_correlation(chosen, way, one) for one in ("kl", "loss")] for way in WAYS + WHOLE_WAYS}
            groups[f"{model}, {label}"] = {"edits": len(chosen), "spearman": found}
    ratios = {}
    for low, high in itertools.pairwise(BINS):
        inside = [row for row in rows if low <= row["predicted"]["curvature"] < high and row["kl"] > 0]
        for way in ("curvature", "corrected"):
            shares = sorted(row["kl"] / row["predicted"][way] for row in inside)
            deciles = statistics.quantiles(shares, n=10)
            ratios[f"{low:g} to {high:g}, {way}"] = {
                "edits": len(shares), "median": statistics.median(shares), "low": deciles[0], "high": deciles[-1],
            }  # fmt: skip
    tops = {}
    for background in dict.fromkeys(row["background"] for row in blame):
        chosen = [row for row in blame if row["background"] == background]
        tops[str(background)] = {
            "faults": len(chosen),
            **{way: sum(row["blamed"][way] == row["costliest"] for row in chosen) / len(chosen) for way in WAYS},
        }
    return {"spearman": groups, "measured_over_predicted": ratios, "top1": tops}


COLUMNS = {
    "curvature": "curvature",
    "corrected": "with EK-FAC eigenvalues",
    "empirical": "labels of the data",
    "gradient": "with first-order term",
    "coupled": "gradients of windows",
    "squared norm": "squared norm",
}


def correlation_table(result: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [f"| model, edits | number | {' | '.join(COLUMNS.values())} |"]
    lines.append(f"| --- | --- |{' --- |' * len(COLUMNS)}")
    for label, one in result["summary"]["spearman"].items():
        cells = [f"{one['spearman'][way][0]:.3f} / {one['spearman'][way][1]:.3f}" for way in COLUMNS]
        lines.append(f"| {label} | {one['edits']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ratio_table(result: Mapping[str, Any]) -> str:
    """Markdown."""
    found = result["summary"]["measured_over_predicted"]
    lines = ["| predicted, nats per token | edits | measured / predicted | with EK-FAC eigenvalues |"]
    lines.append("| --- | --- | --- | --- |")
    for low, high in itertools.pairwise(BINS):
        parts = [found[f"{low:g} to {high:g}, {way}"] for way in ("curvature", "corrected")]
        cells = [f"{one['median']:.2f} ({one['low']:.2f} to {one['high']:.2f})" for one in parts]
        words = f"{low:g} to {high:g}" if math.isfinite(high) else f"above {low:g}"
        lines.append(f"| {words} | {parts[0]['edits']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def blame_table(result: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [f"| all other matrices | faults | {' | '.join(WAYS)} |", f"| --- | --- |{' --- |' * len(WAYS)}"]
    for background, one in result["summary"]["top1"].items():
        cells = " | ".join(f"{one[way]:.1%}" for way in WAYS)
        lines.append(f"| rounded to {background} bits | {one['faults']} | {cells} |")
    return "\n".join(lines)


def predictor_table(result: Mapping[str, Any]) -> str:
    """Markdown: the held-out loss of each plan, and ours over that by the norm."""
    cells = {(row["model"], row["average"], row["predictor"]): row for row in result["rows"]}
    names = list(dict.fromkeys(row["predictor"] for row in result["rows"]))
    lines = [f"| model | bits | {' | '.join(names)} | {OURS} / norm |", f"| --- | --- |{' --- |' * (len(names) + 1)}"]
    for model in dict.fromkeys(row["model"] for row in result["rows"]):
        for average in dict.fromkeys(row["average"] for row in result["rows"]):
            found = [cells[model, average, name] for name in names]
            parts = [f"{one['truth_nats']:.4f} ± {one['truth_half_interval']:.4f}" for one in found]
            ratio = cells[model, average, OURS]["truth_nats"] / cells[model, average, NORM]["truth_nats"]
            lines.append(f"| {model} | {average:g} | {' | '.join(parts)} | **{ratio:.2f}** |")
    return "\n".join(lines)


def picture(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """PNG: measured against predicted, both logarithmic, a panel a model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 4.8), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    models = list(dict.fromkeys(row["model"] for row in rows))
    panels = figure.subplots(1, len(models), sharex=True, sharey=True)
    ends = (1e-6, 5.0)
    for axis, model in zip(panels, models, strict=True):
        axis.fill_between(
            ends, [end / 2 for end in ends], [end * 2 for end in ends], color=INK, alpha=0.08, linewidth=0
        )
        axis.plot(ends, ends, color=INK, linewidth=1)
        for kind, colour in KINDS.items():
            for is_whole in (True, False):
                own = [row for row in rows if row["model"] == model and row["kind"] == kind]
                own = [row for row in own if (row["matrix"] is None) == is_whole and row["kl"] > 0]
                axis.scatter(
                    [row["predicted"]["curvature"] for row in own], [row["kl"] for row in own], s=26,
                    facecolors=colour if is_whole else "none", edgecolors=colour, linewidths=1.1,
                    label=f"{kind}, {'all matrices' if is_whole else 'one'}",
                )  # fmt: skip
        own = [row for row in rows if row["model"] == model]
        axis.set_title(f"{model}: Spearman {rank_correlation(own, 'curvature', 'kl'):.3f}", fontsize=10)
        axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="predicted loss change, nats per token")
        axis.grid(alpha=0.25)
    panels[0].set_ylabel("measured KL, nats per token")
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle("1/2 tr(G E A E') against the outputs; band: within a factor of two", fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
