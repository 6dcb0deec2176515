"""`weightproof inspect`: the spectral report of a local model folder or a Hub model."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weightproof.errors import InputError
from weightproof.folders.loading import resolve_folder

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from weightproof.cli.spectral_report import MatrixReport, SpectralReport

NAME_WIDTH = 26


class Null(StrEnum):
    """What the noise of a matrix is assumed to look like."""

    BIWHITENED = "biwhitened"
    GLOBAL = "global"
    SIGNFLIP = "signflip"


def inspect(
    model: Annotated[str, typer.Argument(help="Model folder with safetensors weights, or a model id of the Hub.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the complete report as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a picture of all spectra to this PNG file.")] = None,
    null: Annotated[Null, typer.Option(help="Null model of the Marchenko-Pastur fit.")] = Null.BIWHITENED,
    limit: Annotated[int | None, typer.Option(min=1, help="Measure only the first N matrices.")] = None,
) -> None:
    """Report spectra, noise fit and weight distribution of a model, matrix by matrix."""
    if plot is not None:
        check_plot(plot)
    folder = resolve_folder(model)
    report = _measure(folder, model, null.value, limit)
    if as_json:
        sys.stdout.write(json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n")
    else:
        print_report(report)
    if plot is not None:
        _write_plot(plot, report)


def shorten(name: str, width: int) -> str:
    """`name` in at most `width` columns: words give way to their initials, numbers and the role stay.

    Example:
        >>> shorten("model.layers.31.self_attn.q_proj", 20)
        'm.l.31.s.q_proj'
    """
    parts = name.split(".")
    for position, part in enumerate(parts[:-1]):
        if len(".".join(parts)) <= width:
            break
        if not part.isdigit():
            parts[position] = part[0] if part else part
    short = ".".join(parts)
    return short if len(short) <= width else f"…{short[1 - width :]}"


def display_names(names: Sequence[str]) -> list[str]:
    """Names without `.weight` and without a first component that most of them share (`model.`)."""
    bare = [name.removesuffix(".weight") for name in names]
    [(first, count)] = Counter(name.split(".")[0] for name in bare).most_common(1) or [("", 0)]
    short = [name.removeprefix(f"{first}.") for name in bare]
    return short if 2 * count > len(bare) and len(set(short)) == len(set(bare)) else bare


def print_report(report: SpectralReport) -> None:
    """Write the report for people to standard output."""
    from weightproof.cli.decision_view import open_console

    console = open_console()
    if report.measured:
        table = _matrix_table(report, console.width)
        console.print(table)
        console.print(_legend(report.null, {str(column.header) for column in table.columns}), style="dim", end="\n\n")
        console.print(_family_table(report), "")
    _print_refused(console, report)
    console.print(f"measured {len(report.measured)} of {len(report.matrices)} weight matrices of {report.model}")
    if report.looks_untrained:
        console.print(
            "[bold]looks untrained[/bold]: every measured spectrum is a pure Marchenko-Pastur bulk, as random "
            "initialisation gives; if it should be trained, its weights were not really loaded or saved"
        )


def _measure(folder: Path, title: str, null: str, limit: int | None) -> SpectralReport:
    from tqdm import tqdm

    from weightproof.cli.spectral_report import build_report
    from weightproof.weights import iter_checkpoint_matrices

    matrices = list(iter_checkpoint_matrices(folder))  # lazy: `load` reads a tensor only when it is measured
    with tqdm(matrices, desc="measuring spectra", unit="matrix", file=sys.stderr, leave=False) as bar:
        return build_report(title, bar, null=null, limit=limit)


def check_plot(path: Path) -> None:
    """Refuse a picture that could not be written, before hours of measuring rather than after."""
    if path.suffix.lower() != ".png":
        raise InputError(f"--plot writes PNG: give a file name that ends in .png, not {path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--plot cannot write to {path.parent}: {error.strerror}; choose another folder") from error
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"--plot cannot write {path}: choose a file in a folder that you may write to")


def _write_plot(path: Path, report: SpectralReport) -> None:
    from weightproof.folders.files import write_atomically
    from weightproof.reporting.plots import inspect_png

    write_atomically(path, inspect_png(report.model, report.fits))
    sys.stderr.write(f"wrote {path}\n")


# -- tables ------------------------------------------------------------------------------------------


def _number(value: float | None, form: str = ".3g") -> str:
    return "-" if value is None else f"{value:{form}}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%" if value >= 0.0995 or value == 0 else f"{100 * value:.1f}%"


def _alpha(matrix: MatrixReport) -> str:
    if matrix.alpha is None:
        return "-"
    return f"{matrix.alpha:.2f}±{_number(matrix.alpha_error, '.2f')} k{matrix.alpha_tail}"


def _spikes(matrix: MatrixReport) -> str:
    if matrix.frobenius_norm == 0:
        return "zero"
    return "bulk" if matrix.pure_bulk else _number(matrix.num_spikes, "d")


def _cells(matrix: MatrixReport) -> dict[str, str]:
    """Column title -> cell, in order of display."""
    return {
        "shape": f"{matrix.d_out}x{matrix.d_in}",
        "s1": _number(matrix.spectral_norm),
        "‖W‖F": _number(matrix.frobenius_norm),
        "stable\nrank": _number(matrix.stable_rank),
        "sigma": _number(matrix.sigma_mp),
        "edge": _number(matrix.edge_plus),
        "spikes": _spikes(matrix),
        "spike\nenergy": _percent(matrix.spike_energy),
        "KS": _number(matrix.ks_distance, ".2f"),
        "alpha ± se k": _alpha(matrix),
        "std": _number(matrix.std),
        "zeros": _percent(matrix.sparsity),
        "excess\nkurt.": _number(matrix.kurtosis, ".2f"),
    }


DROP_FIRST = ("KS", "edge", "‖W‖F", "zeros", "sigma", "excess\nkurt.", "spike\nenergy", "std")
"""Columns that a narrow terminal does without, in this order; JSON always has all."""


def _matrix_table(report: SpectralReport, width: int) -> Table:
    """One row a matrix, in model order; columns give way until names keep `NAME_WIDTH` characters."""
    rows = [(matrix, _cells(matrix)) for matrix in report.measured]
    names = display_names([matrix.name for matrix, _ in rows])
    columns = list(rows[0][1])
    wanted = min(NAME_WIDTH, max(map(len, names)))
    room = _room(rows, columns, width)
    for column in DROP_FIRST:
        if room >= wanted:
            break
        columns.remove(column)
        room = _room(rows, columns, width)
    table = _table(f"{report.model}: singular values against the {report.null} Marchenko-Pastur bulk")
    table.add_column("matrix", no_wrap=True)
    table.add_column("family", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for (matrix, cells), name in zip(rows, names, strict=True):
        table.add_row(shorten(name, max(8, room)), matrix.family, *(cells[column] for column in columns))
    return table


def _room(rows: Iterable[tuple[MatrixReport, dict[str, str]]], columns: list[str], width: int) -> int:
    """Characters left for the names of the matrices."""
    rows = list(rows)
    used = max(len("family"), *(len(matrix.family) for matrix, _ in rows))
    for column in columns:
        used += max([*map(len, column.split("\n")), *(len(cells[column]) for _, cells in rows)])
    return width - used - (len(columns) + 1)  # one blank between two columns


def _family_table(report: SpectralReport) -> Table:
    table = _table("by family (counts, then medians)")
    titles = "family", "measured", "pure bulk", "spikes", "s1", "‖W‖F", "stable rank", "alpha", "std", "zeros", "kurt."
    for title in titles:
        table.add_column(title, justify="left" if title == "family" else "right", no_wrap=True)
    for family in report.families:
        table.add_row(
            family.family,
            f"{family.measured} of {family.matrices}",
            str(family.pure_bulk),
            str(family.num_spikes),
            _number(family.spectral_norm),
            _number(family.frobenius_norm),
            _number(family.stable_rank),
            _number(family.alpha, ".2f"),
            _number(family.std),
            _percent(family.sparsity),
            _number(family.kurtosis, ".2f"),
        )
    return table


def _legend(null: str, shown: Collection[str]) -> str:
    """What the columns that are shown mean, in one sentence."""
    noise = {"sigma": "noise scale", "edge": "upper end of the noise"}
    parts = [f"{column}: {meaning}" for column, meaning in noise.items() if column in shown]
    if parts and null == "biwhitened":
        parts[-1] += " (both of the whitened matrix, not in the units of s1)" if len(parts) == 2 else " after whitening"
    parts += ["spikes: singular values above the noise (bulk: none)", "k: eigenvalues in the tail of alpha"]
    return "; ".join(parts)


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0, show_edge=False)


def _print_refused(console: Console, report: SpectralReport) -> None:
    """Every matrix that was not measured, by name, gathered by reason."""
    by_reason: dict[str, list[str]] = {}
    for matrix in report.refused:
        by_reason.setdefault(matrix.reason or "no reason given", []).append(matrix.name.removesuffix(".weight"))
    for reason, names in by_reason.items():
        console.print(f"not measured ({reason}): {', '.join(names)}", markup=False)
