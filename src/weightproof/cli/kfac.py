"""`weightproof kfac sweep`: what K-FAC edits of several sizes make a model forget, and what they cost."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weightproof.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightproof.edits.kfac_sweep import SweepRow

app = typer.Typer(
    help="Try K-FAC edits of a model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def group() -> None:
    """Try K-FAC edits of a model."""


@app.command("sweep")
def sweep_command(  # noqa: PLR0913, PLR0917 - one option a line
    model: Annotated[str, typer.Argument(help="Model folder (or Hub id).")],
    factors: Annotated[Path, typer.Option(help="Factors of this model (weightproof factors fit).")],
    clean: Annotated[Path, typer.Option(help="Text or JSONL whose loss should stay.")],
    forget: Annotated[Path, typer.Option(help="JSONL of sequences that should no longer be recited.")],
    prefix: Annotated[int, typer.Option(help="Tokens of each sequence that are given.")] = 64,
    suffix: Annotated[int | None, typer.Option(help="Tokens that count as recited; all that follow by default.")] = 48,
    energies: Annotated[str, typer.Option(help="Shares of the curvature to keep.")] = "0.99,0.95,0.9,0.8,0.6",
    formulas: Annotated[str, typer.Option(help="original, modified, ekfac.")] = "original",
    controls: Annotated[str, typer.Option(help="Compare with: random, inverse, svd.")] = "",
    include: Annotated[list[str] | None, typer.Option(help="Glob of matrices; may be repeated.")] = None,
    length: Annotated[int, typer.Option(help="Tokens per window of --clean.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(help="Read no more of --clean.")] = 100_000,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for sweep.json and sweep.png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
    device: Annotated[str, typer.Option(help="Where the model is run, as torch names it.")] = "cpu",
) -> None:
    """Edit the model in memory at each energy, measure recall and clean loss, and put it back; nothing is changed."""
    from weightproof.curvature import Factors
    from weightproof.curvature.text_batches import TextBatches
    from weightproof.edits.kfac import DEFAULT_TARGETS
    from weightproof.edits.kfac_sweep import clean_nll, recall, sweep
    from weightproof.folders.loading import load_model, resolve_folder
    from weightproof.folders.text_data import read_examples

    shares = _numbers(energies)
    loaded = load_model(resolve_folder(model), device=device)
    sequences = [example["input_ids"] for example in read_examples(forget, loaded.encode, name="forget")]
    metrics = {
        "recall": recall(sequences, prefix, suffix=suffix),
        "clean NLL": clean_nll(TextBatches(clean, loaded.encode, length, max_tokens=max_tokens, name="clean")),
    }
    rows = sweep(
        loaded.model, Factors.load(factors), shares, _words(formulas),
        metrics=metrics, include=tuple(include) if include else DEFAULT_TARGETS, controls=_words(controls),
    )  # fmt: skip
    if out is not None:
        _write(out, rows)
    if as_json:
        sys.stdout.write(json.dumps([vars(row) for row in rows], indent=2, default=dict) + "\n")
    else:
        _show(rows)
        if out is not None:
            sys.stdout.write(f"written to {out}\n")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in _words(text)]
    except ValueError:
        raise InputError(f"--energies {text!r} must be numbers from 0 to 1, such as 0.9,0.8,0.6") from None


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _write(out: Path, rows: Sequence[SweepRow]) -> None:
    from weightproof.edits.kfac_picture import sweep_png
    from weightproof.folders.files import make_folders, write_atomically

    make_folders(out)
    write_atomically(out / "sweep.json", json.dumps([vars(row) for row in rows], indent=2, default=dict).encode())
    write_atomically(out / "sweep.png", sweep_png(rows))


def _show(rows: Sequence[SweepRow]) -> None:
    from rich import box
    from rich.table import Table

    from weightproof.cli.decision_view import open_console

    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("edit", overflow="fold")
    for head in ("energy", "pairs kept", "predicted", *rows[0].metrics):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        predicted = "-" if row.predicted is None else f"{row.predicted:.4f}"
        values = [f"{value:.1%}" if name == "recall" else f"{value:.4f}" for name, value in row.metrics.items()]
        table.add_row(row.edit, f"{row.energy:g}", f"{row.kept_pairs:.1%}", predicted, *values)
    open_console().print(table)
