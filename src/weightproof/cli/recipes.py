"""`weightproof recipes`: what is shipped, as it is written, and a copy to change."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="List recipes, show one, or copy one to change it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command("list")
def list_recipes(as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False) -> None:
    """List the recipes that are installed, ours and those of other packages."""
    rows = described()
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from weightproof.cli.decision_view import open_console

    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("recipe", no_wrap=True)
    for title in ("run it with", "steps", "what it is for"):
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(row[key])) for key in ("name", "run", "steps", "description")))
    open_console().print(table)


@app.command()
def show(recipe: Annotated[str, typer.Argument(help="Name of a recipe, or a file.")]) -> None:
    """Print a recipe as it is written, comments too."""
    from weightproof.procedure.source import find_recipe

    sys.stdout.write(find_recipe(recipe).text)


@app.command()
def copy(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe.")],
    to: Annotated[Path | None, typer.Argument(help="File to write; NAME.yaml here by default.")] = None,
) -> None:
    """Write a recipe to a file of your own; an existing file is left alone."""
    from weightproof.errors import InputError
    from weightproof.folders.files import write_atomically
    from weightproof.procedure.source import find_recipe

    found = find_recipe(recipe)
    path = Path(f"{found.name}.yaml") if to is None else to
    path = path / f"{found.name}.yaml" if path.is_dir() else path
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"{path} is not called .yaml: `weightproof run` would take it for the name of a recipe")
    if path.exists():
        raise InputError(f"{path} exists already and is left alone: name another file")
    write_atomically(path, found.text.encode())
    sys.stdout.write(f"{path}\n")


def described() -> list[dict[str, Any]]:
    """Name, command, steps and description of every installed recipe; why one cannot be used."""
    from weightproof.errors import InputError
    from weightproof.folders.plain_yaml import parse_yaml
    from weightproof.procedure.fields import Fields
    from weightproof.procedure.source import shipped_recipes
    from weightproof.recipe import GROUPS

    rows: list[dict[str, Any]] = []
    for name, file in shipped_recipes().items():
        run, steps, description = f"weightproof run {name}", "", ""
        try:
            content = Fields(parse_yaml(file.read_text(encoding="utf-8"), name))
            verb = content.get("verb", str | None)
            run = run if verb is None else f"weightproof {verb}"
            description = " ".join(content.get("description", str, "").split())
            verbs = [] if verb is not None else content.items("edits")
            steps = ", ".join(
                _in_a_word(word, one.values[word]) for one in verbs for word in GROUPS if word in one.values
            )
        except InputError as error:
            description = f"cannot be used: {error}"
        rows.append({"name": name, "run": run, "steps": steps, "description": description})
    return rows


def _in_a_word(verb: str, what: object) -> str:
    """What a step runs; a plan has settings where others have the name of a plug-in."""
    return what if isinstance(what, str) else verb
