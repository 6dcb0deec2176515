"""Plans of equal size by what they were predicted with: curvature, measured KL, and norms that know no data.

    .venv/bin/python benchmarks/equal_size.py --write

Three models: a Llama and a GPT-2 of the tests (a minute of training, kept in .cache), and the model of `weightproof
demo`. For each an average width is given, every predictor chooses the widths of the matrices within it, and the loss of
what it chose is measured on held-out windows that no predictor saw. Writes equal_size.json and a table of
docs/planner.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import planner as planner_bench
import torch
from curvature_tables import NORM, OURS, predictor_table
from planner import by_predictor, load_case, of_size, paired, window_losses

from weightproof import GuardSession, fit_factors, iter_weight_matrices, planner
from weightproof.collective import Processes
from weightproof.planner import Curvature, Frobenius, Grid, Scene
from weightproof.planner.mixed_plan import MixedPlan, output_windows
from weightproof.planner.predictors import Predictor, trial
from weightproof.types import WeightMatrix
from weightproof_callbacks.commands import corpus
from weightproof_callbacks.commands.demo import load_recipe

HERE = Path(__file__).resolve().parent
RESULT, PAGE = HERE / "equal_size.json", HERE.parent / "docs" / "planner.md"
sys.path.insert(0, str(HERE.parent / "tests" / "support"))

import trained_models  # noqa: E402 - the models of the tests

WIDTHS = (2, 3, 4, 6, 8)
AVERAGES = (2.29, 2.45, 2.64, 2.95, 3.26)
MODELS = ("demo", "llama", "gpt2")
FACTOR_WINDOWS = 300


@dataclass(frozen=True)
class Case:
    """A model and its text: for guards and measured KL, for factors, and for the truth."""

    model: Any
    grid: Grid
    retain: Sequence[Any]
    factor_data: Sequence[Mapping[str, torch.Tensor]]
    truth: torch.Tensor


def demo_case(folder: Path | None, *, fast: bool) -> Case:
    """Factors are fitted on text that the model was trained on."""
    from transformers import AutoTokenizer

    case, recipe = load_case(folder, fast=fast), load_recipe("demo", fast=fast)
    part, where = recipe["corpus"], case.model.config._name_or_path
    texts = corpus.read_corpus(corpus.standard_library(), part["exclude"], part["max_bytes"], part["heldout_fraction"])
    tokenizer = AutoTokenizer.from_pretrained(where)
    windows = corpus.spread(
        corpus.cut_windows(list(texts.train.values()), tokenizer, recipe["training"]["window"]), FACTOR_WINDOWS
    )
    data = [{"input_ids": ids} for ids in windows.ids.split(8)]
    return Case(case.model, Grid("group", 64), [row[None] for row in case.retain], data, case.truth)


def small_case(name: str) -> Case:
    """Windows of the same Markov chain, each kind from a seed of its own."""
    recipe = trained_models.RECIPES[name]
    data = [{"input_ids": one["input_ids"]} for one in trained_models.make_windows(recipe, 64, 50_000)]
    truth = torch.cat([one["input_ids"] for one in trained_models.make_windows(recipe, 64, 20_000)])
    retain = trained_models.calibration_windows(name, 8)
    return Case(trained_models.load(name).model, Grid("group", 32), retain, data, truth)


class RelativeFrobenius:
    """||W' - W||_F^2 / ||W||_F^2, over the matrices that get one width."""

    name = "relative Frobenius error"

    def __init__(self, squared: Predictor) -> None:
        self.squared = squared

    def predict(self, matrices: Sequence[WeightMatrix], bits: int) -> float:
        """See `weightproof.planner.Predictor`."""
        whole = sum(float(one.load().double().square().sum()) for one in matrices)
        return self.squared.predict(matrices, bits) / whole


def harms_of(case: Case) -> tuple[MixedPlan, dict[str, list[list[float]]], dict[str, float]]:
    """The plan with all widths measured, the harm of each width by each predictor, and what each took in seconds."""
    matrices = {one.name: one for one in iter_weight_matrices(case.model)}
    seconds: dict[str, float] = {}
    policy = planner.budget_policy("balanced", 1.01, has_loss=True)
    with closing(GuardSession(case.model, policy=policy, retain=case.retain)) as session:
        start = time.process_time()
        # A budget so small that no width is free: all are measured.
        found = planner.plan(session, 1 + 1e-9, WIDTHS, **case.grid.params())
        seconds["measured KL"] = time.process_time() - start
        chosen = tuple(matrices[name] for choice in found.choices for name in choice.matrices)
        windows = output_windows(session)
    scene = Scene(case.model, chosen, WIDTHS, case.grid, Processes.alone(), lambda: windows)
    start = time.process_time()
    factors = fit_factors(case.model, case.factor_data, progress=False)
    seconds["fitting factors"] = time.process_time() - start
    squared = Frobenius(calibrate=False).prepare(scene)
    predictors = {
        OURS: Curvature(factors).prepare(scene),
        NORM: squared,
        "relative Frobenius error": RelativeFrobenius(squared),
    }
    harms = {}
    for name, predictor in predictors.items():
        start = time.process_time()
        harms[name] = by_predictor(found, predictor, matrices)
        seconds[name] = time.process_time() - start
    harms["measured KL"] = [[option.nats for option in choice.options] for choice in found.choices]
    return found, harms, seconds


def rows_of(name: str, case: Case) -> Iterator[dict[str, Any]]:
    """What every predictor's plan of every size costs."""
    found, harms, seconds = harms_of(case)
    print(f"{name}: {', '.join(f'{what} {value:.1f} s' for what, value in seconds.items())}", flush=True)
    matrices = {one.name: one for one in iter_weight_matrices(case.model)}
    weights = sum(choice.num_weights for choice in found.choices)
    scales = 8 * sum(choice.options[0].size for choice in found.choices) / weights - WIDTHS[0]
    base = window_losses(case.model, case.truth)
    known: dict[tuple[int, ...], tuple[float, float]] = {}  # predictors often agree
    for average in AVERAGES:
        size = found.size_of.others + int(weights * (average + scales) / 8)
        for predictor, rows in harms.items():
            plan = of_size(found, rows, size)
            key = tuple(plan.bits.values())
            if key not in known:
                with trial(case.model, [matrices[one] for one in plan.bits], plan.edit, Processes.alone()):
                    known[key] = paired(window_losses(case.model, case.truth), base)
            mean, half = known[key]
            predicted = sum(row[choice.chosen] for row, choice in zip(rows, plan.choices, strict=True))
            yield {
                "model": name, "average": average, "predictor": predictor, "predicted": predicted,
                "truth_nats": mean, "truth_half_interval": half, "seconds": seconds.get(predictor),
            }  # fmt: skip
        print(f"{name}: {average} bits done", flush=True)


def write(result: Mapping[str, Any]) -> None:
    """The numbers, and the table of the page."""
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    begin, end = "<!-- predictors: begin -->\n", "\n<!-- predictors: end -->"
    head, found, rest = page.partition(begin)
    if not found:
        raise SystemExit(f"{PAGE} has no place for the table: {begin.strip()}")
    PAGE.write_text(f"{head}{begin}{predictor_table(result)}{end}{rest.partition(end)[2]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write equal_size.json and the table of docs/planner.md")
    parser.add_argument("--model", type=Path, help="folder of the demo model (weightproof demo: its base)")
    parser.add_argument("--fast", action="store_true", help="a tiny demo model: tests the path")
    parser.add_argument("--table", action="store_true", help="only the table, from the committed equal_size.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.table:
        result = json.loads(RESULT.read_text(encoding="utf-8"))
    else:
        planner_bench.BATCH = 32
        rows: list[dict[str, Any]] = []
        for name in MODELS:
            case = demo_case(arguments.model, fast=arguments.fast) if name == "demo" else small_case(name)
            rows += rows_of(name, case)
        result = {"torch": torch.__version__, "widths": WIDTHS, "rows": rows}
    print(predictor_table(result))
    if arguments.write:
        write(result)


if __name__ == "__main__":
    main()
