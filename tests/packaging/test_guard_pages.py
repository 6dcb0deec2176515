"""Each guard has a page with its rule, evidence for its defaults and blind spots, as code and tiers have them."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import guard_pages
import pytest

from weightproof.registry import load_plugin, plugins

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("## Rule", "## Evidence for the defaults", "## Blind spots")
NAMES = sorted(plugins("weightproof.guards"))


def page(name: str) -> str:
    return guard_pages.page_of(name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_a_page_has_its_parts_and_names_tier_and_limits(name):
    guard, text = load_plugin("weightproof.guards", name), page(name)
    places = [text.find(f"\n{part}\n") for part in PARTS]
    assert all(place > 0 for place in places), f"docs/guards/{name}.md lacks one of {PARTS}"
    assert places == sorted(places)
    heading = text.splitlines()[0]
    assert heading.startswith(f"# {name} (")
    assert guard.tier in heading
    missing = [limit.name for limit in dataclasses.fields(guard.Limits) if f"`{limit.name}`" not in text]
    missing = [limit for limit in missing if f"| {limit} |" not in text]  # a table may do without marks
    assert not missing, f"docs/guards/{name}.md does not name {missing}"


@pytest.mark.parametrize("name", guard_pages.GUARDS)
def test_defaults_on_a_page_are_those_of_the_tiers(name):
    text = page(name)
    assert guard_pages.with_table(text, name) == text, "run: python tests/support/guard_pages.py --write"


def test_readings_on_the_pages_are_those_of_the_last_run(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "support"))
    spec = importlib.util.spec_from_file_location("guard_readings", ROOT / "benchmarks" / "guard_readings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    result = json.loads((ROOT / "benchmarks" / "guard_readings.json").read_text(encoding="utf-8"))
    for guard in module.STATISTICS:
        text = page(guard)
        assert "<!-- readings: begin -->" in text
        assert module.with_table(text, result, guard) == text
