"""Loss changes foreseen from K-FAC factors, held against what they turn out to be; and whom the factors blame.

    .venv/bin/python benchmarks/curvature.py --write

Two briefly trained models (a Llama and a GPT-2, of which the layers are Conv1D) are edited in many ways, all of their
matrices or one, from harmless to ruinous. The prediction makes no forward pass; the measurement is the KL of the
outputs and the change of the loss on held-out text. Then every matrix gets a little rounding noise and one is damaged
more: does the largest prediction name the costliest matrix? Writes curvature.json, docs/images/curvature-prediction.png
and the tables of docs/kfac.md.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

from weightproof import fit_factors, iter_weight_matrices, predict_loss_change
from weightproof.collective import Processes
from weightproof.curvature import Factors
from weightproof.curvature.fitting import correct_eigenvalues
from weightproof.edits import RTN, SVD, Prune
from weightproof.numerics.matrices import seeded_generator
from weightproof.planner.predictors import trial
from weightproof.reporting.plots import BLUE, DPI, GREEN, INK, ORANGE, PURPLE
from weightproof.types import WeightMatrix

HERE = Path(__file__).resolve().parent
RESULT, PAGE = HERE / "curvature.json", HERE.parent / "docs" / "kfac.md"
PICTURE = HERE.parent / "docs" / "images" / "curvature-prediction.png"
sys.path.insert(0, str(HERE.parent / "tests" / "support"))

import trained_models  # noqa: E402 - the models of the tests

MODELS = ("llama", "gpt2")
FIT_BATCHES, TRUTH_BATCHES = 64, 32
KINDS = {"RTN": BLUE, "noise": ORANGE, "prune": GREEN, "SVD": PURPLE}
BINS = (0.0, 1e-3, 1e-2, 1e-1, math.inf)
# Curvature with the eigenvalues of EK-FAC where "corrected", and two norms that know nothing of the data.
WAYS = ("curvature", "corrected", "empirical", "squared norm", "relative norm")
BACKGROUNDS = (8, 4)

Plan = Callable[[WeightMatrix], torch.Tensor | None]


# ---------------------------------------------------------------- edits


@dataclass(frozen=True)
class Noise:
    """Normal noise of a share of each matrix's own standard deviation."""

    strength: float

    def plan(self, matrix: WeightMatrix) -> torch.Tensor:
        """The noisy matrix; the same each time."""
        weight = matrix.load()
        drawn = torch.randn(weight.shape, generator=seeded_generator("benchmark", matrix.name, self.strength))
        return weight + self.strength * weight.std() * drawn


@dataclass(frozen=True)
class Case:
    """One edit of some matrices."""

    kind: str
    label: str
    plan: Plan
    matrix: str | None = None


def whole_model_cases() -> Iterator[Case]:
    """Edits of every matrix, from harmless to ruinous."""
    for bits in range(8, 1, -1):
        yield Case("RTN", f"{bits} bits", RTN(bits).plan)
    for bits in (4, 3, 2):
        yield Case("RTN", f"{bits} bits, groups of 32", RTN(bits, "group", 32).plan)
    for strength in (0.003, 0.01, 0.03, 0.1, 0.2, 0.4):
        yield Case("noise", f"{strength:g} of the std", Noise(strength).plan)
    for sparsity in (0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.8):
        yield Case("prune", f"{sparsity:.0%}", Prune(sparsity).plan)
    for rank in (60, 48, 32, 16, 8):
        yield Case("SVD", f"rank {rank}", SVD(rank=rank).plan)


def single_matrix_cases(names: Sequence[str]) -> Iterator[Case]:
    """Edits of one matrix at a time, every third."""
    for name in names[::3]:
        for kind, label, plan in faults():
            yield Case(kind, label, plan, name)


def faults() -> Iterator[tuple[str, str, Plan]]:
    """What is done to one matrix."""
    yield "RTN", "3 bits", RTN(3).plan
    yield "RTN", "2 bits", RTN(2).plan
    yield "noise", "0.3 of the std", Noise(0.3).plan
    yield "prune", "70%", Prune(0.7).plan
    yield "SVD", "rank 16", SVD(rank=16).plan


# ---------------------------------------------------------------- one model


class Bench:
    """A model, its factors, and what is measured with it."""

    def __init__(self, name: str) -> None:
        recipe = trained_models.RECIPES[name]
        self.name, self.model = name, trained_models.load(name).model
        data = [{"input_ids": one["input_ids"]} for one in trained_models.make_windows(recipe, FIT_BATCHES, 50_000)]
        self.factors: dict[str, Factors] = {
            "curvature": fit_factors(self.model, data, progress=False),
            "empirical": fit_factors(self.model, data, labels="empirical", progress=False),
        }
        self.factors["corrected"] = correct_eigenvalues(self.factors["curvature"], self.model, data, progress=False)
        self.matrices = {one.name: one for one in iter_weight_matrices(self.model) if one.name in self.curvature}
        self.before = {name: one.load().clone() for name, one in self.matrices.items()}
        windows = trained_models.make_windows(recipe, TRUTH_BATCHES, 20_000)
        self.ids = torch.cat([window["input_ids"] for window in windows])
        self.base = self.log_probabilities()

    @property
    def curvature(self) -> Factors:
        """With labels drawn from the model."""
        return self.factors["curvature"]

    @torch.no_grad()
    def log_probabilities(self) -> torch.Tensor:
        """(windows, tokens - 1, vocabulary)."""
        logits = [self.model(input_ids=ids).logits[:, :-1] for ids in self.ids.split(64)]
        return torch.cat(logits).double().log_softmax(dim=-1)

    def changed(self, plan: Plan, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """The matrices after an edit; where it leaves one (a rank that it has not), as it was."""
        found = {name: plan(self.matrices[name]) for name in names}
        return {name: self.before[name] if value is None else value for name, value in found.items()}

    def predicted(self, after: Mapping[str, torch.Tensor]) -> dict[str, dict[str, float]]:
        """Way -> matrix -> prediction."""
        whole = self.before | dict(after)
        found: dict[str, dict[str, float]] = {}
        for way, factors in self.factors.items():
            told = predict_loss_change(factors, self.before, whole).by_matrix
            found[way] = {name: math.inf if (value := told[name]) is None else value for name in after}
        squares = {
            name: float((value.double() - self.before[name].double()).square().sum()) for name, value in after.items()
        }
        found["squared norm"] = squares
        sizes = {name: float(self.before[name].double().square().sum()) for name in after}
        found["relative norm"] = {name: squares[name] / sizes[name] for name in after}
        return found

    def measured(self, after: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """KL and change of the loss in nats per token, with the standard error of the latter."""
        with trial(self.model, [self.matrices[name] for name in after], _Given(after), Processes.alone()):
            now = self.log_probabilities()
        kl = (self.base.exp() * (self.base - now)).sum(dim=-1).mean()
        labels = self.ids[:, 1:, None]
        change = (self.base.gather(-1, labels) - now.gather(-1, labels))[..., 0].mean(dim=1)
        error = change.std() / math.sqrt(len(change))
        return {"kl": float(kl), "loss": float(change.mean()), "loss_error": float(error)}


@dataclass(frozen=True)
class _Given:
    """An edit that writes given values."""

    values: Mapping[str, torch.Tensor]
    name: str = "given values"

    def plan(self, matrix: WeightMatrix) -> torch.Tensor:
        return self.values[matrix.name]


# ---------------------------------------------------------------- the two questions


def prediction_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """Prediction and measurement of every case."""
    names = list(bench.matrices)
    for case in (*whole_model_cases(), *single_matrix_cases(names)):
        after = bench.changed(case.plan, names if case.matrix is None else [case.matrix])
        told = {way: sum(values.values()) for way, values in bench.predicted(after).items()}
        yield {
            "model": bench.name, "kind": case.kind, "edit": case.label, "matrix": case.matrix,
            **bench.measured(after), "predicted": told,
        }  # fmt: skip


def blame_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """Every matrix rounded, one damaged more. The costliest is the one whose own change alone has the largest KL."""
    names = list(bench.matrices)
    harms: dict[tuple[str, str, str], float] = {}
    told: dict[tuple[str, str, str], dict[str, float]] = {}

    def look(name: str, kind: str, label: str, plan: Plan) -> None:
        after = bench.changed(plan, [name])
        harms[name, kind, label] = bench.measured(after)["kl"]
        told[name, kind, label] = {way: values[name] for way, values in bench.predicted(after).items()}

    for name in names:
        for background in BACKGROUNDS:
            look(name, "background", str(background), RTN(background).plan)
        for kind, label, plan in faults():
            look(name, kind, label, plan)
    for background in BACKGROUNDS:
        for kind, label, _ in faults():
            for damaged in names:
                keys = {name: (name, "background", str(background)) for name in names}
                keys[damaged] = (damaged, kind, label)
                costliest = max(names, key=lambda name: harms[keys[name]])
                blamed = {way: max(names, key=lambda name: told[keys[name]][way]) for way in WAYS}
                yield {
                    "model": bench.name, "background": background, "fault": f"{kind} {label}", "damaged": damaged,
                    "costliest": costliest, "blamed": blamed,
                }  # fmt: skip


# ---------------------------------------------------------------- what it says


def rank_correlation(rows: Sequence[Mapping[str, Any]], way: str, measure: str) -> float:
    """Spearman's."""
    return float(spearmanr([row["predicted"][way] for row in rows], [row[measure] for row in rows]).statistic)


def summary(rows: Sequence[Mapping[str, Any]], blame: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Correlations, measured over predicted by size, and top-1 blame."""
    groups: dict[str, Any] = {}
    for model in MODELS:
        own = [row for row in rows if row["model"] == model]
        whole = [row for row in own if row["matrix"] is None]
        single = [row for row in own if row["matrix"] is not None]
        for label, chosen in (("all", own), ("whole model", whole), ("one matrix", single)):
            found = {way: [rank_correlation(chosen, way, one) for one in ("kl", "loss")] for way in WAYS}
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
    for background in BACKGROUNDS:
        chosen = [row for row in blame if row["background"] == background]
        tops[str(background)] = {
            "faults": len(chosen),
            **{way: sum(row["blamed"][way] == row["costliest"] for row in chosen) / len(chosen) for way in WAYS},
        }
    return {"spearman": groups, "measured_over_predicted": ratios, "top1": tops}


def correlation_table(result: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = ["| model, edits | number | curvature | with EK-FAC eigenvalues | empirical labels | squared norm |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for label, one in result["summary"]["spearman"].items():
        cells = [
            f"{one['spearman'][way][0]:.3f} / {one['spearman'][way][1]:.3f}"
            for way in ("curvature", "corrected", "empirical", "squared norm")
        ]
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


def picture(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """PNG: measured against predicted, both logarithmic, a panel a model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 4.8), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(MODELS), sharex=True, sharey=True)
    ends = (1e-6, 5.0)
    for axis, model in zip(panels, MODELS, strict=True):
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


def run() -> dict[str, Any]:
    """Everything that the tables say."""
    rows: list[dict[str, Any]] = []
    blame: list[dict[str, Any]] = []
    for name in MODELS:
        bench = Bench(name)
        print(f"{name}: factors of {next(iter(bench.curvature.by_name.values())).tokens} tokens", flush=True)
        rows += prediction_rows(bench)
        print(f"{name}: {len(rows)} edits measured so far", flush=True)
        blame += blame_rows(bench)
    return {"torch": torch.__version__, "summary": summary(rows, blame), "edits": rows, "blame": blame}


def write(result: Mapping[str, Any]) -> None:
    """The numbers, the picture and the tables of the page."""
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    PICTURE.write_bytes(picture(result["edits"]))
    page = PAGE.read_text(encoding="utf-8")
    tables = {"correlation": correlation_table, "ratios": ratio_table, "blame": blame_table}
    for name, table in tables.items():
        begin, end = f"<!-- {name}: begin -->\n", f"\n<!-- {name}: end -->"
        head, found, rest = page.partition(begin)
        if not found:
            raise SystemExit(f"{PAGE} has no place for the table {name!r}: {begin.strip()}")
        page = f"{head}{begin}{table(result)}{end}{rest.partition(end)[2]}"
    PAGE.write_text(page, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write curvature.json, the picture and docs/kfac.md")
    parser.add_argument("--table", action="store_true", help="only the tables, from the committed curvature.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = json.loads(RESULT.read_text(encoding="utf-8")) if arguments.table else run()
    print(*(make(result) for make in (correlation_table, ratio_table, blame_table)), sep="\n\n")
    if arguments.write:
        write(result)


if __name__ == "__main__":
    main()
