"""The table of defaults on each guard's page, made from the shipped tiers: values, whether provisional, and sources.

    python tests/support/guard_pages.py --write

A tier that changes without its page is found by `tests/packaging/test_guard_pages.py`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from weightproof.cli.policy import is_provisional, source_of, values_of
from weightproof.policy import load_policy

TIERS = ("conservative", "balanced", "aggressive")
GUARDS = ("spectral", "rmt", "circuits", "divergence", "variance", "loss")
DOCS = Path(__file__).resolve().parents[2] / "docs"
BEGIN, END = "<!-- limits: begin -->\n", "\n<!-- limits: end -->"


def page_of(guard: str) -> Path:
    """The page of a guard."""
    return DOCS / "guards" / f"{guard}.md"


def limits_table(guard: str) -> str:
    """Every limit of a guard in the three tiers, and where the value of balanced comes from."""
    policies = {tier: load_policy(tier) for tier in TIERS}
    values = {tier: values_of(policy) for tier, policy in policies.items()}
    prefix = f"limits.{guard}."
    lines = [f"| limit | {' / '.join(TIERS)} | balanced: from |", "| --- | --- | --- |"]
    rows: dict[tuple[str, str], dict[str, list[str]]] = {}  # limit and source -> value -> families
    for key in (key for key in values["balanced"] if key.startswith(prefix)):
        cells = [_number(values[tier].get(key)) for tier in TIERS]
        shown = cells[0] if len(set(cells)) == 1 else " / ".join(cells)
        mark = " *" if any(is_provisional(policy, key) for policy in policies.values()) else ""
        name, _, family = key.removeprefix(prefix).partition(".")
        source = _source(source_of(policies["balanced"], key), guard)
        rows.setdefault((name, source), {}).setdefault(shown + mark, []).append(family or "default")
    for (name, source), found in rows.items():
        one = next(iter(found)) if len(found) == 1 else ""
        cell = one or "<br>".join(f"{', '.join(families)}: {shown}" for shown, families in found.items())
        lines.append(f"| `{name}` | {cell} | {source} |")
    return "\n".join(lines)


def with_table(page: str, guard: str) -> str:
    """The page with its table put between the two marks."""
    head, _, rest = page.partition(BEGIN)
    assert rest, f"docs/guards/{guard}.md has no place for its limits"
    return head + BEGIN + limits_table(guard) + END + rest.partition(END)[2]


def _number(value: Any) -> str:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return json.dumps(value).strip('"').replace("null", "none")
    if isinstance(value, float) and value != int(value):
        text = f"{value:.6g}"
        return text.removeprefix("0") if "e" not in text else re.sub(r"e([+-])0*", r"e\1", text)
    return f"{int(value):,}"


def _source(text: str, guard: str) -> str:
    """The source in Markdown: pages as links, seen from docs/guards."""
    return "".join(_linked(text.replace("|", "\\|"), guard))


def _linked(text: str, guard: str) -> Iterator[str]:
    at = 0
    for found in re.finditer(r"docs/([\w/-]+)\.md( E\d+)?", text):
        yield text[at : found.start()]
        at = found.end()
        page, entry = found[1], (found[2] or "").strip()
        name = page.rpartition("/")[2]
        if name == guard:
            yield "this page"
        elif not (DOCS / f"{page}.md").exists():
            yield f"{name} {entry}".strip()
        else:
            target = f"{name}.md" if page.startswith("guards/") else f"../{page}.md"
            yield f"[{f'{name} {entry}'.strip()}]({target})"
    yield text[at:]


def main() -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put them into docs/guards/*.md")
    write = parser.parse_args().write
    for guard in GUARDS:
        if write:
            path = page_of(guard)
            path.write_text(with_table(path.read_text(encoding="utf-8"), guard), encoding="utf-8")
        else:
            print(guard, limits_table(guard), sep="\n\n", end="\n\n")


if __name__ == "__main__":
    main()
