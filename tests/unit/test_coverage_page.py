"""docs/coverage.md shows what benchmarks/coverage.json holds, and that is what the loss guard promises."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REPORT = json.loads((ROOT / "benchmarks" / "coverage.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("coverage_script", ROOT / "benchmarks" / "coverage.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_page_holds_the_tables_of_the_last_run(script):
    page = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
    assert script.with_tables(page, script.tables(REPORT)) == page


def test_the_last_run_was_of_these_settings(script):
    assert REPORT["min_effective_size"] == script.MIN_EFFECTIVE_SIZE
    assert REPORT["min_sequential_size"] == script.MIN_SEQUENTIAL_SIZE
    assert REPORT["min_groups_to_accept"] == script.MIN_GROUPS_TO_ACCEPT
    assert REPORT["sequential_share_of_the_error"] == script.SEQUENTIAL_SHARE


@pytest.mark.parametrize("row", REPORT["coverage"], ids=lambda row: row["weights"])
def test_where_an_interval_decides_it_covers_what_it_promises(row):
    assert row["trials"] >= 1000
    assert row["undecided"] == 1.0 or 0.93 <= row["coverage"] <= 0.97


@pytest.mark.parametrize("row", REPORT["false_accepts"], ids=lambda row: f"{row['weights']}-{row['noise']}")
def test_peeking_accepts_wrongly_in_at_most_one_case_in_twenty(row):
    if row["noise"] == "rare":  # said on the page: what few windows carry is not seen in few windows
        assert row["peeking"] <= row["peeking_from_the_start"]
    else:
        assert row["peeking"] <= 0.05


def test_the_script_runs(script, monkeypatch):
    monkeypatch.setattr(script, "NUM_PEEKS", 60)
    monkeypatch.setattr(script, "NUM_TEST", 60)
    made = script.tables(script.measure(10))
    assert all(text.count("\n") >= 3 for text in made.values())
