"""`weightproof edit kfac`: one edit of a model folder under guard, from the model to a new folder with its evidence.

It is the recipe of one step, and leaves what a recipe leaves: the folder is there as a whole or not at all.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightproof.errors import InputError

if TYPE_CHECKING:
    from weightproof.edits.kfac import KFAC, KFACReading
    from weightproof.procedure.result import RecipeResult

app = typer.Typer(
    help="Edit a model folder under guard, and write the edited model with its evidence.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_UNDECIDED = 2


@app.callback()
def group() -> None:
    """Edit a model folder under guard, and write the edited model with its evidence."""


@app.command("kfac")
def kfac_command(  # noqa: PLR0913, PLR0917 - one option a line
    model: Annotated[str, typer.Argument(help="Model folder (or Hub id).")],
    factors: Annotated[Path, typer.Option(help="Factors of this model (weightproof factors fit).")],
    energy: Annotated[float, typer.Option(help="Share of the curvature to keep, 0 to 1.")] = 0.6,
    formula: Annotated[str, typer.Option(help="original, modified or ekfac.")] = "original",
    include: Annotated[list[str] | None, typer.Option(help="Glob of matrices; may be repeated.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Glob of those to leave out; may be repeated.")] = None,
    retain: Annotated[Path | None, typer.Option(help="Text or JSONL on which the model must not get worse.")] = None,
    policy: Annotated[str, typer.Option(help="conservative, balanced, aggressive, or a policy file.")] = "balanced",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder of the results; needed but to try.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would do to each matrix, and stop.")] = False,
    device: Annotated[str, typer.Option(help="Where the model is run, as torch names it.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Keep the directions of most curvature. Exit code 0 kept, 1 rolled back, 2 undecided, 3 bad input."""
    from weightproof.curvature.factors import load_factors
    from weightproof.edits.kfac import DEFAULT_TARGETS, KFAC
    from weightproof.procedure.output import check_place

    if out is None and not dry_run:
        raise InputError("name a folder for the results with --out, or see what would happen with --dry-run")
    if out is not None:
        check_place(out)
    chosen = tuple(include) if include else DEFAULT_TARGETS
    edit = KFAC(load_factors(factors), energy, formula, include=chosen, exclude=tuple(exclude or ()))
    if dry_run:
        _dry_run(model, edit, device, as_json=as_json)
        return
    params = {"factors": str(factors.absolute()), "energy": energy, "formula": formula}
    params |= {"include": list(chosen)} if include else {}
    params |= {"exclude": list(exclude)} if exclude else {}
    result = _carried_out(model, "kfac", params, policy=policy, retain=retain, device=device, out=out, factors=factors)
    if as_json:
        sys.stdout.write(json.dumps({"exit_code": code_of(result), **result.to_json()}, indent=2) + "\n")
    else:
        _show(result)
    if code := code_of(result):
        raise typer.Exit(code)


def _carried_out(  # noqa: PLR0913 - what a recipe of one step holds
    model: str,
    edit: str,
    params: dict[str, Any],
    *,
    policy: str,
    retain: Path | None,
    device: str,
    out: Path | None,
    factors: Path,
) -> RecipeResult:
    """The recipe of one edit, run."""
    from weightproof.procedure.run import run
    from weightproof.procedure.source import RecipeText
    from weightproof.recipe import parse_recipe

    content = {
        "description": f"{edit}, as weightproof edit was asked for it.",
        "model": str(Path(model).expanduser().absolute()) if Path(model).expanduser().is_dir() else model,
        "device": device,
        "data": {} if retain is None else {"retain": str(retain.absolute())},
        "policy": str(Path(policy).absolute()) if policy.endswith((".yaml", ".yml")) else policy,
        "factors": str(factors.absolute()),
        "edits": [{"edit": edit, "name": edit, **params}],
    }
    written = {key: value for key, value in content.items() if value != {}}
    recipe = parse_recipe(RecipeText(written, f"edit-{edit}", Path.cwd(), f"weightproof edit {edit}"))
    return run(recipe, out, say=_say, progress=sys.stderr.isatty())


def code_of(result: RecipeResult) -> int:
    """0 kept; 1 rolled back; 2 where too little was measured to keep it."""
    from weightproof.certifying.certification import is_undecided

    (step,) = result.steps
    if result.code and step.action == "ROLLBACK" and is_undecided(step.situation):
        return _UNDECIDED
    return result.code


def _show(result: RecipeResult) -> None:
    from weightproof.cli.decision_view import open_console
    from weightproof.cli.run import show_result

    show_result(result)
    if result.model is None:
        open_console().print("no model was written: the edit was taken back, the evidence says why", markup=False)


# ---------------------------------------------------------------- what would be done


def _dry_run(model: str, edit: KFAC, device: str, *, as_json: bool) -> None:
    """What the edit would do to each matrix; nothing is written."""
    from weightproof.edits.kfac import readings_of
    from weightproof.folders.loading import load_model, resolve_folder

    rows = readings_of(edit, load_model(resolve_folder(model), device=device).model)
    if as_json:
        sys.stdout.write(json.dumps([vars(row) for row in rows], indent=2) + "\n")
        return
    _show_rows(rows)


def _show_rows(rows: list[KFACReading]) -> None:
    from rich import box
    from rich.table import Table

    from weightproof.cli.decision_view import number, open_console

    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("matrix", overflow="fold")
    for head in ("pairs kept", "change", "predicted nats"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name, f"{row.kept_pairs:.1%}", f"{row.relative_change:.1%}", number(row.predicted_loss_change)
        )
    total = sum(row.predicted_loss_change or 0.0 for row in rows)
    console = open_console()
    console.print(table)
    console.print(
        f"{len(rows)} matrices would be edited; {total:.3g} nats per token predicted, which falls short where matrices "
        "change much: run it to have it measured",
        soft_wrap=True, markup=False,
    )  # fmt: skip


def _say(words: str) -> None:
    """What is being done, where somebody watches a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"{words} ...\n")
