"""`weightproof run`: carry a recipe out, every step guarded, and write models and evidence."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from weightproof.procedure.result import RecipeResult, StepResult

STYLES = {"KEEP": "green", "ROLLBACK": "bold red", "HALT": "bold red"}


def run(  # noqa: PLR0913, PLR0917 - one option a line
    recipe: Annotated[str, typer.Argument(help="Recipe file (.yaml), or a name of `weightproof recipes list`.")],
    model: Annotated[str | None, typer.Option(help="Model folder (or Hub id) in place of the recipe's.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder of the results.")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Replace a value: edits[0].bits=4; may be repeated.")
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="The recipe's values for a run of seconds.")] = False,
    cache: Annotated[Path, typer.Option(help="Folder in which the small demo model is kept.")] = Path(
        ".cache/weightproof"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Run a recipe. Exit code 0: every step ended as the recipe expects; 1: one did not; 3: bad input."""
    from weightproof.procedure.run import run as carry_out
    from weightproof.recipe import load_recipe

    found = load_recipe(recipe, sets=sets or (), fast=fast)
    result = carry_out(found, out, model=model, cache=cache, say=_say, progress=sys.stderr.isatty())
    if as_json:
        sys.stdout.write(json.dumps(result.to_json(), indent=2, allow_nan=False) + "\n")
    else:
        show_result(result)
    if result.code:
        raise typer.Exit(result.code)


def _say(words: str) -> None:
    """What is being done, where somebody watches a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"{words} ...\n")


def show_result(result: RecipeResult) -> None:
    """What a recipe led to: a table, reasons, and where it lies."""
    from weightproof.cli.decision_view import open_console

    console = open_console()
    console.print(_table(result), "")
    _show_reasons(console, result)
    _show_paths(console, result)
    surprises = sum(not step.as_expected for step in result.steps)
    console.print("every step as expected" if not surprises else f"{surprises} of {len(result.steps)} not as expected")


def _table(result: RecipeResult) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    title = f"recipe {result.recipe} on {result.base.name}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for head in ("step", "what", "decision", "assurance"):
        table.add_column(head, overflow="fold")
    for head in ("KL", "loss ratio", "size", "seconds"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_row("(begin)", "", "", "", "", "", size_in_words(result.base_size), "")
    for step in result.steps:
        style = STYLES.get(step.action, "dim")
        other = "" if step.as_expected else f", expected {step.expect}"
        numbers = _number(step.kl, ".4f"), _number(step.loss_ratio, ".4f"), _size(step), _number(step.seconds, ".1f")
        table.add_row(escape(step.name), step.verb, f"[{style}]{step.action}[/]{other}", step.assurance, *numbers)
    return table


def _size(step: StepResult) -> str:
    return "-" if step.size is None else size_in_words(step.size)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def size_in_words(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**20:.2f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def _show_reasons(console: Console, result: RecipeResult) -> None:
    """Why a step was not kept, and what a reader should know."""
    from rich.markup import escape

    for step in result.steps:
        lines = [step.reason] if step.action not in ("KEEP", "not run") or not step.as_expected else []
        if step.reverted:
            lines.append(f"kept in part: {len(step.reverted)} tensors were taken back, {step.reverted[0]} among them")
        for line in (*lines, *step.notes):
            console.print(f"{escape(step.name)}: {escape(line)}", soft_wrap=True)
    for line in result.notes:
        console.print(f"note: {escape(line)}", soft_wrap=True)


def _show_paths(console: Console, result: RecipeResult) -> None:
    place = _relative(result.out)
    console.print(f"evidence {place}/certificate.json, {place}/report.html, {place}/events.jsonl", soft_wrap=True)
    for step in result.steps:
        if step.model is not None:
            console.print(f"model {step.name} {place}/{step.model}", soft_wrap=True)
    certified = [step for step in result.steps if step.model is not None]
    if not certified:
        return
    last = f"{place}/{certified[-1].model}"
    program = "weightproof" if shutil.which("weightproof") else _relative(Path(sys.executable).with_name("weightproof"))
    console.print("to verify the last model with its certificate:")
    line = f"  {program} verify {last}/certificate.json --model {last} --unsigned-ok"
    console.print(line, markup=False, soft_wrap=True)


def _relative(path: Path) -> str:
    found = os.path.relpath(path)
    return str(path) if found.startswith("..") else found
