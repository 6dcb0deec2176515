"""`weightproof delta`: differences of weights, out of adapters, pairs and checkpoints; shown, and tried on a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weightproof.cli import steer
from weightproof.cli.delta_report import report
from weightproof.errors import InputError

if TYPE_CHECKING:
    from weightproof.deltas import Delta

app = typer.Typer(
    help="Make, show and try differences of weights (LoRA deltas, contrasts, checkpoints).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("report")(report)
for _verb in (steer.alpha, steer.search, steer.steer):
    app.command(_verb.__name__)(_verb)


@app.command()
def make(  # noqa: PLR0913, PLR0917 - one option a line
    first: Annotated[Path, typer.Argument(help="Adapter, delta, or folder of the model before.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write (.safetensors), or a folder.")],
    second: Annotated[Path | None, typer.Argument(help="The other side of a contrast, or the model after.")] = None,
    base: Annotated[Path | None, typer.Option(help="Folder of the adapters' base: checked; needed for DoRA.")] = None,
    mode: Annotated[str, typer.Option(help="Of a contrast: difference, or bisector (equal sides).")] = "difference",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")] = False,
) -> None:
    """Write a delta: of one adapter, the contrast of two (FIRST - SECOND), or the difference of two models."""
    from weightproof.deltas import Delta

    if second is None:
        delta = _side(first, base)
    elif _is_model(first) or _is_model(second):
        if not (_is_model(first) and _is_model(second)):
            raise InputError(f"{first} and {second} are an adapter and a model: give two of one kind")
        delta = Delta.between(first, second)
    else:
        delta = Delta.contrast(_side(first, base), _side(second, base), mode)  # pyright: ignore[reportArgumentType]
    rows = _rows(delta)  # what cannot be shown, such as NaN, is not written
    path = delta.save(out)
    _show(delta, rows, as_json=as_json)
    if not as_json:
        sys.stdout.write(f"written to {path}\n")


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="A delta's file or folder, or an adapter's folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show what a delta was made from, and how large it is in each matrix."""
    from weightproof.deltas import Delta

    delta = Delta.load(path)
    _show(delta, _rows(delta), as_json=as_json)


def _is_model(path: Path) -> bool:
    from weightproof.differences.delta_file import NAME
    from weightproof.lora.folders import is_adapter_folder

    return path.is_dir() and not (path / NAME).exists() and not is_adapter_folder(path)


def _side(path: Path, base: Path | None) -> Delta:
    from weightproof.deltas import Delta
    from weightproof.lora.folders import is_adapter_folder

    if _is_model(path):
        raise InputError(f"{path} is neither a delta nor an adapter: of a whole model give two, before and after")
    return Delta.from_adapter(path, base=base) if is_adapter_folder(path) else Delta.load(path)


def _rows(delta: Delta) -> dict[str, dict[str, object]]:
    from weightproof.deltas import LowRank

    rows: dict[str, dict[str, object]] = {}
    for name in delta.names:
        part, values = delta.parts[name], delta.singular_values(name)
        squares = values.square()
        top = float(values[0]) if len(values) else 0.0
        rows[name] = {
            "d_out": part.shape[0],
            "d_in": part.shape[1],
            "rank": part.rank if isinstance(part, LowRank) else None,
            "norm": delta.metadata["norms"][name],
            "spectral_norm": top,
            "stable_rank": float(squares.sum()) / top**2 if top else None,
        }
    return rows


def _show(delta: Delta, rows: dict[str, dict[str, object]], *, as_json: bool) -> None:
    if as_json:
        metadata = {key: value for key, value in delta.metadata.items() if key != "norms"}
        content = {"digest": delta.digest, "metadata": metadata, "parts": rows}
        sys.stdout.write(json.dumps(content, indent=2, allow_nan=False) + "\n")
        return
    from rich import box
    from rich.table import Table

    from weightproof.cli.decision_view import open_console

    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("matrix", overflow="fold")
    for head in ("shape", "rank", "||D||_F", "||D||_2", "stable rank"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, row in rows.items():
        stable = "-" if row["stable_rank"] is None else f"{row['stable_rank']:.2f}"
        rank = "dense" if row["rank"] is None else str(row["rank"])
        table.add_row(
            name, f"{row['d_out']}x{row['d_in']}", rank, f"{row['norm']:.4g}", f"{row['spectral_norm']:.4g}", stable
        )
    console = open_console()
    console.print(table)
    for line in _about(delta):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _about(delta: Delta) -> list[str]:
    about = delta.metadata
    base = about["base"].get("name") or "a base that it does not name"
    checked = len(delta.base_digests)
    known = f"the digests of {checked} matrices of it are known" if checked else "its weights are not known"
    source = "" if about["source"] is None else f" of {about['source']}"
    lines = [f"{about['mode']}{source}, for {base} ({known}); digest {delta.digest[:12]}"]
    if sides := about.get("sides"):
        shown = ", ".join(f"{key} {value:.4g}" for key, value in sides.items() if value is not None)
        lines.append(f"sides: {shown}")
    lines += [f"not in it: {name} ({why})" for name, why in about["not_included"].items()]
    return lines + list(about["notes"])
