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
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from curvature_tables import WAYS, blame_table, correlation_table, picture, ratio_table, summary

from weightproof import fit_factors, iter_weight_matrices, predict_loss_change
from weightproof.collective import Processes
from weightproof.curvature import Factors
from weightproof.curvature.fitting import correct_eigenvalues
from weightproof.curvature.objectives import sample
from weightproof.edits import RTN, SVD, Prune
from weightproof.numerics.matrices import seeded_generator
from weightproof.planner.predictors import trial
from weightproof.types import WeightMatrix

HERE = Path(__file__).resolve().parent
RESULT, PAGE = HERE / "curvature.json", HERE.parent / "docs" / "kfac.md"
PICTURE = HERE.parent / "docs" / "images" / "curvature-prediction.png"
sys.path.insert(0, str(HERE.parent / "tests" / "support"))

import trained_models  # noqa: E402 - the models of the tests

MODELS = ("llama", "gpt2")
FIT_BATCHES, TRUTH_BATCHES = 64, 32
GRADIENT_WINDOWS = 256
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
        self.gradient = self.mean_gradient(torch.cat([one["input_ids"] for one in data]))
        self.slopes = self.window_gradients(data[0]["input_ids"].shape[1])

    @property
    def curvature(self) -> Factors:
        """With labels drawn from the model."""
        return self.factors["curvature"]

    @torch.no_grad()
    def log_probabilities(self) -> torch.Tensor:
        """(windows, tokens - 1, vocabulary)."""
        logits = [self.model(input_ids=ids).logits[:, :-1] for ids in self.ids.split(64)]
        return torch.cat(logits).double().log_softmax(dim=-1)

    def gradients(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of the summed loss, by matrix, (d_out, d_in)."""
        parameters = dict(self.model.named_parameters())
        logits = self.model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        found = torch.autograd.grad(loss, [parameters[name] for name in self.matrices])
        return {
            name: value.T if self.name == "gpt2" else value  # Conv1D keeps (d_in, d_out)
            for name, value in zip(self.matrices, found, strict=True)
        }

    def mean_gradient(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of the loss of the data, per token."""
        total = {name: torch.zeros_like(value) for name, value in self.before.items()}
        for part in ids.split(64):
            for name, value in self.gradients(part, part[:, 1:]).items():
                total[name] += value / (len(ids) * (ids.shape[1] - 1))
        return total

    def window_gradients(self, length: int) -> list[dict[str, torch.Tensor]]:
        """One for each of some windows, with labels drawn from the model."""
        ids = trained_models.chain_samples(GRADIENT_WINDOWS, length, seed=70_000)
        found = []
        for number, row in enumerate(ids.split(1)):
            with torch.no_grad():
                logits = self.model(input_ids=row).logits[0, :-1]
            labels = sample(logits, seeded_generator("benchmark labels", self.name, number))
            found.append(self.gradients(row, labels[None, :]))
        return found

    def predicted_whole(self, after: Mapping[str, torch.Tensor], told: float) -> dict[str, float]:
        """Way -> prediction of the whole edit; `told` is that of the curvature."""
        change = {name: value - self.before[name] for name, value in after.items()}
        products = [sum(float((one[name] * step).sum()) for name, step in change.items()) for one in self.slopes]
        first = sum(float((self.gradient[name] * step).sum()) for name, step in change.items())
        tokens = self.ids.shape[1] - 1
        return {
            "gradient": told + first,
            "coupled": sum(product**2 for product in products) / (2 * tokens * len(products)),
        }

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
        told |= bench.predicted_whole(after, told["curvature"])
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


# ---------------------------------------------------------------- the run


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
