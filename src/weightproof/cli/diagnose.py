"""`weightproof diagnose`: training health of a model folder, as a table, JSON and a picture."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightproof.errors import InputError

if TYPE_CHECKING:
    from weightproof.health import HealthReport

FAILED, UNDECIDED = 1, 2
_STYLES = {"pass": "green", "warn": "yellow", "fail": "red", "invalid": "bold red", "skipped": "dim"}


class Depth(StrEnum):
    """How depth utility is measured."""

    SKIP = "skip"
    REINIT = "reinit"


def diagnose(  # noqa: PLR0913, PLR0917 - one option a line
    model: Annotated[str, typer.Argument(help="Model folder (or Hub id).")],
    data: Annotated[
        Path | None, typer.Option(help="Held-out text or JSONL; without it random tokens and the model's own labels.")
    ] = None,
    depth: Annotated[
        Depth | None, typer.Option(help="Leave out each block in turn: skip it, or draw its matrices anew.")
    ] = None,
    blocks: Annotated[
        list[str] | None, typer.Option(help="Name of a list of blocks, where none is found; may be repeated.")
    ] = None,
    batches: Annotated[int, typer.Option(min=1, help="Batches; 8 or more for agreement to be judged.")] = 8,
    rows: Annotated[int, typer.Option(min=1, help="Windows in each batch.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens in each window at most.")] = 128,
    warmup: Annotated[bool, typer.Option("--warmup", help="The model is untrained, or in its warm-up.")] = False,
    seed: Annotated[int, typer.Option(help="Of random tokens, labels and matrices.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the complete report as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write four panels to this PNG file.")] = None,
    device: Annotated[str, typer.Option(help="Where the model is run, as torch names it.")] = "cpu",
) -> None:
    """Diagnose the training of a model: scale of its residual stream, gradients, agreement, use of its blocks.

    Exit codes: 0 nothing failed, 1 a diagnostic failed or is invalid, 2 nothing could be measured.
    """
    from weightproof.cli.inspect import check_plot
    from weightproof.folders.files import write_atomically
    from weightproof.folders.loading import load_model, resolve_folder
    from weightproof.health import diagnose as measure
    from weightproof.health import health_png

    if plot is not None:
        check_plot(plot)
    if depth is not None and data is None:
        raise InputError("--depth compares losses on labels of the data: give --data")
    loaded = load_model(resolve_folder(model), device=device)
    report = measure(
        loaded.model,
        _batches(loaded, data, {"batches": batches, "rows": rows, "length": length}, seed),
        blocks=blocks or None,
        labels="given" if data is not None else "sampled",
        depth=None if depth is None else depth.value,
        in_warmup=warmup,
        seed=seed,
        method_name=Path(model).name,
    )
    if as_json:
        sys.stdout.write(json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n")
    else:
        print_report(report)
    if plot is not None:
        write_atomically(plot, health_png(report))
        sys.stderr.write(f"wrote {plot}\n")
    if report.flags:
        raise typer.Exit(FAILED)
    if report.overall == "skipped":
        raise typer.Exit(UNDECIDED)


def print_report(report: HealthReport) -> None:
    """Write the report for people to standard output."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from weightproof.cli.decision_view import open_console
    from weightproof.diagnostics.report import shown

    console = open_console()
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, pad_edge=False)
    table.add_column("diagnostic", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for column in ("value", "limit"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("where and why", overflow="fold")
    for name, one in report.diagnostics.items():
        style = _STYLES[str(one.status)]
        table.add_row(
            f"{name} ", f"[{style}]{one.status}[/{style}] ", f"{shown(one.value)} ", f"{shown(one.threshold)}  ",
            escape(one.message),
        )  # fmt: skip
    console.print(table)
    console.print(f"[bold]{escape(report.method_name)}: {escape(report.verdict)}[/bold]")
    made = report.provenance
    console.print(
        f"{made.batches} batches of {made.rows}, {made.tokens} tokens, {made.dtype}, labels {made.labels}, "
        f"seed {made.seed}, weights {(made.model_digest or '-')[:12]}",
        style="dim",
    )


def _batches(loaded: Any, data: Path | None, sizes: dict[str, int], seed: int) -> Any:
    from weightproof.folders.text_data import read_examples
    from weightproof.health import health_batches, random_batches

    if data is None:
        return random_batches(loaded.model, seed=seed, **sizes)
    return health_batches(read_examples(data, loaded.encode, name="health"), loaded.model, **sizes)
