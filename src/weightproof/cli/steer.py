"""`weightproof delta alpha`, `search` and `steer`: how far a delta may go, and going there under guard."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weightproof.errors import InputError

if TYPE_CHECKING:
    from weightproof.alpha.bounds import AlphaTable
    from weightproof.alpha.search import AlphaSearch, Trial

_MODEL = typer.Argument(help="Model folder (or Hub id).")
_DELTA = typer.Argument(help="A delta (weightproof delta make), or the folder of an adapter.")
_POLICY = typer.Option(help="conservative, balanced, aggressive, or a policy file.")
_RETAIN = typer.Option(help="Text or JSONL on which the loss must not rise.")
_OTHER_BASE = typer.Option("--other-base", help="Other weights than it was made for.")
_DEVICE = typer.Option(help="Where the model is run, as torch names it.")
_JSON = typer.Option("--json", help="Print as JSON.")


def alpha(
    model: Annotated[str, _MODEL],
    delta: Annotated[Path, _DELTA],
    policy: Annotated[str, _POLICY] = "balanced",
    other_base: Annotated[bool, _OTHER_BASE] = False,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Foretell from spectra how far a delta may be taken; nothing is written."""
    from weightproof.deltas import Delta
    from weightproof.folders.loading import load_model, resolve_folder
    from weightproof.steering import safe_alpha

    found = Delta.load(delta)
    table = safe_alpha(load_model(resolve_folder(model)).model, found, policy, same_base=not other_base)
    if as_json:
        sys.stdout.write(json.dumps(table.to_json(), indent=2, allow_nan=False) + "\n")
    else:
        _show_table(table)


def search(  # noqa: PLR0913, PLR0917 - one option a line
    model: Annotated[str, _MODEL],
    delta: Annotated[Path, _DELTA],
    alphas: Annotated[str | None, typer.Option(help="Try these, the largest first: 0.1,0.3,1.")] = None,
    bracket: Annotated[str | None, typer.Option(help="Bisect between these two: 0,2.")] = None,
    tolerance: Annotated[float, typer.Option(help="Stop where kept and rejected are this close, relatively.")] = 0.05,
    max_trials: Annotated[int, typer.Option(help="Stop after this many.")] = 16,
    retain: Annotated[Path | None, _RETAIN] = None,
    policy: Annotated[str, _POLICY] = "balanced",
    other_base: Annotated[bool, _OTHER_BASE] = False,
    device: Annotated[str, _DEVICE] = "cpu",
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Find the largest alpha that the guards keep, in memory. Exit code 0: there is one; 1: none was kept."""
    from weightproof.deltas import Delta
    from weightproof.folders.loading import load_model, resolve_folder
    from weightproof.losses import LossData
    from weightproof.session import GuardSession
    from weightproof.steering import search_alpha

    tried, ends = _numbers(alphas, "--alphas"), _numbers(bracket, "--bracket")
    if ends is not None and len(ends) != 2:
        raise InputError(f"--bracket {bracket!r} must be two numbers, such as 0,2")
    found = Delta.load(delta)
    loaded = load_model(resolve_folder(model), device=device)
    data = None if retain is None else LossData(retain, loaded.encode)
    session = GuardSession(loaded.model, policy=policy, retain=data, tokenizer_digest=loaded.tokenizer_digest)
    try:
        result = search_alpha(
            session, found, tried,
            bracket=None if ends is None else (ends[0], ends[1]),
            tolerance=tolerance, max_trials=max_trials, same_base=not other_base,
            on_trial=_say_nothing if as_json else _say,
        )  # fmt: skip
    finally:
        session.close()
    _show_search(result, as_json=as_json, command=f"weightproof delta steer {model} {delta}")
    if result.alpha is None:
        raise typer.Exit(1)


def steer(  # noqa: PLR0913, PLR0917 - one option a line
    model: Annotated[str, _MODEL],
    delta: Annotated[Path, _DELTA],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the model, its certificate and the report.")],
    alpha: Annotated[float, typer.Option(help="How much of the delta; negative: away from it.")] = 1.0,
    retain: Annotated[Path | None, _RETAIN] = None,
    policy: Annotated[str, _POLICY] = "balanced",
    other_base: Annotated[bool, _OTHER_BASE] = False,
    device: Annotated[str, _DEVICE] = "cpu",
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Add a delta for good, under guard, and write the model. Exit code 0: kept; 1: rejected, no model is written."""
    from weightproof.cli.run import show_result
    from weightproof.procedure.run import run as carry_out
    from weightproof.procedure.source import RecipeText
    from weightproof.recipe import parse_recipe

    content = {
        "description": f"Steering by {alpha:g} times a delta.",
        "model": str(Path(model).resolve()) if Path(model).is_dir() else model,
        "device": device,
        "data": {} if retain is None else {"retain": str(retain.resolve())},
        "policy": str(Path(policy).resolve()) if Path(policy).suffix in {".yaml", ".yml"} else policy,
        "edits": [{"edit": "steer", "name": "steer", **_written(delta, alpha, other_base=other_base)}],
    }
    recipe = parse_recipe(RecipeText(content, "steer", Path(), "weightproof delta steer"))
    result = carry_out(recipe, out, say=lambda _: None, progress=sys.stderr.isatty())
    if as_json:
        sys.stdout.write(json.dumps(result.to_json(), indent=2, allow_nan=False) + "\n")
    else:
        show_result(result)
    if result.code:
        raise typer.Exit(result.code)


def _written(delta: Path, alpha: float, *, other_base: bool) -> dict[str, object]:
    """The edit's parameters in a recipe."""
    return {"delta": str(delta.resolve()), "alpha": alpha, "same_base": not other_base}


# ---------------------------------------------------------------- what is shown


def _numbers(text: str | None, option: str) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InputError(f"{option} {text!r} must be numbers with commas between them, such as 0.1,0.3,1") from None


def _say(trial: Trial) -> None:
    style = "kept" if trial.is_kept else trial.action.lower()
    numbers = [f"{word} {value:.4g}" for word, value in (("KL", trial.kl), ("loss +", trial.loss)) if value is not None]
    sys.stdout.write(f"alpha {trial.alpha:<10.4g} {style:<9} {', '.join(numbers)}\n")


def _say_nothing(trial: Trial) -> None:
    """Of JSON, which has every trial at the end."""


def _show_search(result: AlphaSearch, *, as_json: bool, command: str) -> None:
    if as_json:
        content = {
            "alpha": result.alpha,
            "smallest_rejected": result.smallest_rejected,
            "trials": [asdict(trial) for trial in result.trials],
        }
        sys.stdout.write(json.dumps(content, indent=2, allow_nan=False) + "\n")
        return
    if result.alpha is None:
        sys.stdout.write(f"no alpha was kept: {result.trials[-1].reason}\n")
        return
    rejected = result.smallest_rejected
    beyond = "none of those tried was rejected" if rejected is None else f"{rejected:.4g} was rejected"
    sys.stdout.write(
        f"the largest alpha that the guards keep is {result.alpha:.4g} ({beyond}); the model is unchanged\n"
    )
    sys.stdout.write(f"to keep it: {command} --alpha {result.alpha:.4g} --out FOLDER\n")


def _show_table(table: AlphaTable) -> None:
    from rich import box
    from rich.table import Table

    from weightproof.cli.decision_view import open_console

    shown = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    shown.add_column("matrix", overflow="fold")
    for head in ("||W||_2", "||D||_2", "growth bound", "emerges at", "KS"):
        shown.add_column(head, justify="right", no_wrap=True)
    for row in table:
        shown.add_row(
            row.name, *(_number(value) for value in (row.sigma_weight, row.sigma_delta, row.bound, row.emergence)),
            "-" if row.distance is None else f"{row.distance:.2f}",
        )  # fmt: skip
    console = open_console()
    console.print(shown)
    for line in _in_words(table):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _in_words(table: AlphaTable) -> list[str]:
    lines = [f"{row.name}: {row.reason}" for row in table if row.bound is None and row.reason is not None]
    if table.bound is not None and table.binding is not None:
        ratio = f"{table.binding.limit:.4g} times what it is"
        lines.append(
            f"up to |alpha| {table.bound:.4g} no top singular value can grow beyond {ratio} (policy {table.policy}); "
            f"{table.binding.name} binds; up to {table.shrink_bound:.4g} none can shrink as far either"
        )
    if table.first_to_emerge is not None:
        first = table.first_to_emerge
        lines.append(f"from |alpha| {first.emergence:.4g} the delta stands out of the bulk, first in {first.name}")
    if doubted := sum(row.emergence is not None and row.reason is not None for row in table):
        lines.append(f"in {doubted} matrices the weights are far from noise (KS): there that is a rough guide")
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
