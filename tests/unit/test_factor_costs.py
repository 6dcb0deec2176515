"""docs/kfac.md shows the last run of `make benchmark-factors`, and that run keeps within what was set."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULT = json.loads((ROOT / "benchmarks" / "factors.json").read_text(encoding="utf-8"))


def test_the_page_holds_the_table_of_the_last_run():
    spec = importlib.util.spec_from_file_location("factors_benchmark", ROOT / "benchmarks" / "factors.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    begin, end = module.MARKS
    assert f"{begin}{module.table(RESULT)}{end}" in (ROOT / "docs" / "kfac.md").read_text(encoding="utf-8")


def test_fitting_cost_less_than_a_training_step_and_a_third():
    ratios = {name: one["ratio"] for name, one in RESULT["fit"].items()}
    assert ratios["fit gate and up of 3 layers"] <= 1.3
    assert ratios["fit gate and up of all 8 layers"] <= 1.3


def test_masks_and_edits_kept_their_limits():
    assert max(RESULT["mask"]["ms"].values()) <= 50
    assert RESULT["mask"]["peak_bytes"] < RESULT["mask"]["bytes_of_a_boolean_mask"] / 20
    assert max(RESULT["edit"]["peak_in_matrices"].values()) <= 3
