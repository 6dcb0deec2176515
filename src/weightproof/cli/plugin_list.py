"""`weightproof plugins`: everything that is registered, and whether it can be loaded."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer


def list_plugins(
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """List guards, edits, trackers, loaders, recipes and commands. Exit code 1 if one cannot be loaded."""
    found = registered()
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        _show(found)
    if any(entry["error"] is not None for entry in found):
        raise typer.Exit(1)


def registered() -> list[dict[str, str | None]]:
    """Group, name, object and distribution of every plug-in, and why it cannot be loaded (None where it can)."""
    from weightproof.registry import GROUPS, plugins

    found: list[dict[str, str | None]] = []
    for group in GROUPS:
        for name, entry in plugins(group).items():
            error = None
            try:
                entry.load()
            except (ImportError, AttributeError, TypeError, ValueError, RuntimeError, OSError) as caught:
                error = f"{type(caught).__name__}: {str(caught).splitlines()[0] if str(caught) else 'no reason given'}"
            source = f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else None
            kind = group.removeprefix("weightproof.")
            found.append({"group": kind, "name": name, "object": entry.value, "from": source, "error": error})
    return found


def _show(found: list[dict[str, str | None]]) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from weightproof.cli.decision_view import open_console

    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for title in ("group", "name", "object", "from", "loads"):
        table.add_column(title, overflow="fold")
    for entry in found:
        loads = "[green]yes[/]" if entry["error"] is None else f"[red]no[/]: {escape(entry['error'])}"
        table.add_row(entry["group"], entry["name"], entry["object"], entry["from"] or "-", loads)
    open_console().print(table)
