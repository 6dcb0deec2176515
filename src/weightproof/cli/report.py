"""`weightproof report`: a certificate as a page (HTML) or a text (Markdown) for people."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from weightproof.errors import InputError

SUFFIXES = {"html": ".html", "markdown": ".md"}
_HEAD = 4096


def report(  # noqa: PLR0913, PLR0917 - the options of the verb
    certificate: Annotated[Path, typer.Argument(help="Certificate file, signed or not.", metavar="CERT")],
    as_html: Annotated[bool, typer.Option("--html", help="One self-contained page (the default).")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="A text in Markdown.")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write; by default report.html or .md beside CERT.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written, and the decision, as JSON.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is no report.")] = False,
) -> None:
    """Write the report of a certificate. It checks nothing: `weightproof verify` does."""
    from weightproof.certificate import Certificate
    from weightproof.folders.files import write_atomically
    from weightproof.report import html, markdown, summary

    if as_html and as_markdown:
        raise InputError("choose one of --html and --markdown: a report has one form")
    form = "markdown" if as_markdown else "html"
    path = output if output is not None else certificate.with_name(f"report{SUFFIXES[form]}")
    read = Certificate.load(certificate)
    text = markdown(read) if as_markdown else html(read)
    _require_replaceable(path, force)
    write_atomically(path, text.encode())
    told = {"report": str(path), "form": form, **summary(read)}
    sys.stdout.write(json.dumps(told, indent=2) + "\n" if as_json else f"{told['decision']}: wrote {path}\n")


def _require_replaceable(path: Path, force: bool) -> None:
    """Refuse to write over what is not an earlier report: a certificate, for one."""
    from weightproof.report import MARKS

    if path.is_dir():
        raise InputError(f"{path} is a folder: name the file to write with -o")
    if force or not path.exists():
        return
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not any(mark.encode() in head for mark in MARKS.values()):
        raise InputError(f"{path} exists and is no report of weightproof: choose another file, or add --force")
