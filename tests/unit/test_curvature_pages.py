"""docs/kfac.md and docs/planner.md show the last run of the curvature benchmarks, and it keeps what they claim."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CURVATURE = json.loads((ROOT / "benchmarks" / "curvature.json").read_text(encoding="utf-8"))
EQUAL_SIZE = json.loads((ROOT / "benchmarks" / "equal_size.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("curvature_tables", ROOT / "benchmarks" / "curvature_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_hold_the_tables_of_the_last_run(tables):
    kfac, planner = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("kfac.md", "planner.md"))
    assert json.loads(json.dumps(tables.summary(CURVATURE["edits"], CURVATURE["blame"]))) == CURVATURE["summary"]
    for make in (tables.correlation_table, tables.ratio_table, tables.blame_table):
        assert f"begin -->\n{make(CURVATURE)}\n<!-- " in kfac
    assert f"begin -->\n{tables.predictor_table(EQUAL_SIZE)}\n<!-- " in planner


def test_predictions_of_the_last_run_ranked_edits_on_both_models():
    for model in ("llama", "gpt2"):
        found = CURVATURE["summary"]["spearman"][f"{model}, all"]
        assert found["edits"] >= 25
        assert min(found["spearman"]["curvature"]) >= 0.95


def test_the_costliest_matrix_of_the_last_run_was_blamed():
    quiet, loud = CURVATURE["summary"]["top1"].values()
    assert quiet["curvature"] >= 0.99
    assert loud["curvature"] >= 0.95


def test_plans_by_curvature_of_the_last_run_cost_about_half_of_those_by_a_norm():
    losses = {(one["model"], one["average"], one["predictor"]): one["truth_nats"] for one in EQUAL_SIZE["rows"]}
    ratios = sorted(
        value / losses[model, average, "squared Frobenius error"]
        for (model, average, predictor), value in losses.items()
        if predictor == "curvature"
    )
    assert len(ratios) == 15
    assert max(ratios) < 0.9
    assert ratios[len(ratios) // 2] < 0.6


def test_plans_by_curvature_of_the_last_run_cost_what_measured_ones_cost():
    rows = {(one["model"], one["average"], one["predictor"]): one for one in EQUAL_SIZE["rows"]}
    for (model, average, predictor), row in rows.items():
        measured = rows[model, average, "measured KL"]
        if predictor == "curvature":
            assert row["truth_nats"] < 1.1 * measured["truth_nats"] + measured["truth_half_interval"] / 2
