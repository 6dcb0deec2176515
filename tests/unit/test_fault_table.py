"""Every test that the fault table names exists, and every file that it links."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("docs/faults.md", "docs/track-record.md")
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / PAGES[0]).read_text(encoding="utf-8"))))


@pytest.mark.parametrize(("path", "name"), NAMED, ids=lambda value: value)
def test_a_named_test_exists(path, name):
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assigned = {
        one.id for node in tree.body if isinstance(node, ast.Assign) for one in node.targets if hasattr(one, "id")
    }
    assert name in functions | assigned


def test_every_row_of_a_table_of_faults_names_a_test():
    text = (ROOT / PAGES[0]).read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not re.match(r"\| (-|fault \|)", line)]
    assert len(rows) > 30
    assert not [row for row in rows if "::" not in row]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!http)([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert not missing


def test_every_registered_fault_can_be_made_and_is_drilled_or_said_not_to_be():
    from weightproof.testing.faults import REGISTRY, make_fault
    from weightproof_callbacks.commands.drill import NEEDS

    assert set(NEEDS) < set(REGISTRY)
    assert all(make_fault(name).hits for name in REGISTRY)
