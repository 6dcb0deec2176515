"""`weightproof doctor`: what would stop a certification or a guarded run, and what to do about it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightproof.certifying.preflight import Finding

STYLES = {"OK": "green", "WARN": "yellow", "ERROR": "bold red"}


def doctor(  # noqa: PLR0913, PLR0917 - one option a line
    base: Annotated[str | None, typer.Argument(help="Model folder (or Hub id) before a change.")] = None,
    subject: Annotated[str | None, typer.Argument(help="Model folder (or Hub id) after it.")] = None,
    retain: Annotated[Path | None, typer.Option(help="Text or JSONL for --retain.")] = None,
    target: Annotated[Path | None, typer.Option(help="Text or JSONL for --target.")] = None,
    policy: Annotated[str, typer.Option(help="Tier or policy file.")] = "balanced",
    key: Annotated[Path | None, typer.Option(help="Private key to sign with.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder that certify will write to.")] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check environment, models, data, policy and key before a long run. Exit code 1 if something would be refused."""
    from weightproof.certifying.preflight import Level, Plan, examine

    folders = [None if name is None else _folder(name) for name in (base, subject)]
    found = examine(Plan(folders[0], folders[1], retain, target, policy, key, output))
    if as_json:
        content = [{"code": one.code, "level": str(one.level), "what": one.what, "do": one.do} for one in found]
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
    else:
        _show(found)
    if any(one.level is Level.ERROR for one in found):
        raise typer.Exit(1)


def _folder(name: str) -> Path:
    """A local path as it is, so that a folder that is missing is a finding; else what a Hub id resolves to."""
    from weightproof.folders.loading import HUB_ID, resolve_folder

    path = Path(name).expanduser()
    is_id = not path.exists() and HUB_ID.fullmatch(name) is not None and "/" in name and not path.parent.exists()
    return resolve_folder(name) if is_id else path


def _show(found: Sequence[Finding]) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from weightproof.cli.decision_view import open_console

    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for title in ("code", "level"):
        table.add_column(title, no_wrap=True)
    for title in ("what", "what to do"):
        table.add_column(title, overflow="fold")
    for one in found:
        table.add_row(one.code, f"[{STYLES[one.level]}]{one.level}[/]", escape(one.what), escape(one.do))
    console = open_console()
    console.print(table)
    errors, warnings = (sum(str(one.level) == level for one in found) for level in ("ERROR", "WARN"))
    console.print("", f"{errors} errors, {warnings} warnings", sep="\n")
