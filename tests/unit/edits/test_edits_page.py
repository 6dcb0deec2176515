"""docs/edits.md: its examples run, its speeds are those that were measured, its edits are all that there are."""

from __future__ import annotations

import doctest
import json
from pathlib import Path

from weightproof.registry import plugins

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "edits.md"


def test_its_examples_give_what_they_say():
    flags = doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
    result = doctest.testfile(str(PAGE), module_relative=False, optionflags=flags)
    assert result.attempted > 15
    assert result.failed == 0


def test_its_speeds_are_those_of_the_benchmark():
    rows = json.loads((ROOT / "benchmarks" / "edits.json").read_text())["rows"]
    text = PAGE.read_text()
    for name, numbers in rows.items():
        assert f"| {name} | {numbers['ms']:g} | {numbers['reads']:g} |" in text, name


def test_it_has_a_section_for_every_edit_named_in_its_table():
    text = PAGE.read_text()
    sections = {line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")}
    assert {"RTN", "GPTQ", "Prune", "SVD", "TaskArithmetic", "LoraMerge"} <= sections
    assert {"rtn", "gptq", "prune", "svd", "task_arithmetic", "lora_merge"} <= set(plugins("weightproof.edits"))
