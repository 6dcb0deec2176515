"""`weightproof delta report`: which subspaces of the residual stream hold a change of weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weightproof.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from weightproof.delta_report.page import Report
    from weightproof.delta_report.table import Row, Table
    from weightproof.deltas import Delta
    from weightproof.folders.loading import LoadedModel


def report(  # noqa: PLR0913, PLR0917 - one option a line
    base: Annotated[str, typer.Argument(help="Folder (or Hub id) of the base model.")],
    adapter: Annotated[Path, typer.Argument(help="Folder of a LoRA adapter, or a delta (weightproof delta make).")],
    prompts: Annotated[Path | None, typer.Option(help="Clean prompts: a line each, or JSONL.")] = None,
    positive: Annotated[Path | None, typer.Option(help="Prompts that ask for a behaviour.")] = None,
    negative: Annotated[Path | None, typer.Option(help="The same ones asking against it, line by line.")] = None,
    against: Annotated[Path | None, typer.Option(help="The other side: look at ADAPTER minus this one.")] = None,
    mode: Annotated[str, typer.Option(help="Of the contrast with --against: difference or bisector.")] = "difference",
    other_seed: Annotated[
        list[Path] | None, typer.Option(help="The same change trained from another seed; may be repeated.")
    ] = None,
    splits: Annotated[int, typer.Option(help="Further ways to halve the prompts, for the spread.")] = 0,
    rank: Annotated[int, typer.Option(help="Dimensions of a candidate.")] = 8,
    broad_rank: Annotated[
        int | None, typer.Option(help="Dimensions that are projected out; 64, at most a quarter of the width.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts in a pass.")] = 8,
    blocks: Annotated[str | None, typer.Option(help="List of blocks whose stream is read, of several.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for JSON, CSV, picture and page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    device: Annotated[str, typer.Option(help="Where the model is run, as torch names it.")] = "cpu",
) -> None:
    """Score every candidate subspace on a change of BASE: on its weights, and with --prompts on what it does."""
    from weightproof.delta_report.making import in_float32, make_report
    from weightproof.folders.loading import load_model, resolve_folder

    if out is not None and out.is_file():  # told before the work, not after it
        raise InputError(f"--out {out} is a file: give a folder for the report")
    folder = resolve_folder(base)
    loaded = load_model(folder, device=device)
    delta, others = _changes(loaded.model, adapter, against, mode, other_seed or [])
    if prompts is not None:
        delta, *others = in_float32(loaded.model, [delta, *others])
    found = make_report(
        loaded.model, delta, *_batches(loaded, prompts, positive, negative), title=_title(folder, adapter, against),
        others=others, splits=splits, rank=rank, broad_rank=broad_rank, batch_size=batch_size, block_names=blocks,
        around=_progress,
    )  # fmt: skip
    files = () if out is None else found.save(out)
    if as_json:
        sys.stdout.write(json.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n")
        return
    _show(found)
    for file in files:
        sys.stdout.write(f"written to {file}\n")


def _title(folder: Path, adapter: Path, against: Path | None) -> str:
    name = adapter.resolve().name
    change = name if against is None else f"{name} minus {against.resolve().name}"
    return f"{change}, a change of {folder.resolve().name}"


def _changes(
    model: nn.Module, adapter: Path, against: Path | None, mode: str, seeds: Sequence[Path]
) -> tuple[Delta, list[Delta]]:
    from weightproof.delta_report.making import read_change
    from weightproof.deltas import Delta

    if mode not in ("difference", "bisector"):
        raise InputError(f"--mode is difference or bisector, not {mode!r}")
    if against is None:
        return read_change(adapter, model), [read_change(path, model) for path in seeds]
    other = read_change(against, model)
    return (
        Delta.contrast(read_change(adapter, model), other, mode),
        [Delta.contrast(read_change(path, model), other, mode) for path in seeds],
    )


def _batches(loaded: LoadedModel, *paths: Path | None) -> list[dict[str, Tensor] | None]:
    from weightproof.delta_report.prompts import read_prompts

    names = ("prompts", "positive", "negative")
    return [
        None if path is None else read_prompts(path, loaded.encode, name)
        for name, path in zip(names, paths, strict=True)
    ]  # fmt: skip


def _progress(layers: Sequence[int], what: str) -> Iterable[int]:
    from tqdm import tqdm

    return tqdm(layers, desc=what, unit="layer", file=sys.stderr, leave=False, disable=None)


# ---------------------------------------------------------------- the table in a terminal


def _show(found: Report) -> None:
    from weightproof.cli.decision_view import open_console
    from weightproof.delta_report.page import lead, sides, undefined

    table, console = found.table, open_console()
    for title, kinds in (("writes, or is mixed", ("write", "mixed")), ("reads", ("read",)), ("ceilings", ("ceiling",))):
        rows = table.of(*kinds)
        if rows:
            console.print(_grid(title, rows, table))
    told = [lead(table), *(f"{name}: {value}" for name, value in sides(found.change))]
    for one in found.stability:
        orders = [("activations", one.order_act), ("weights", one.order_weights)]
        shown = [f"{value:.2f} on {name}" for name, value in orders if value is not None]
        told.append(f"{one.num_tables} {one.what}: the order of candidates correlates {', '.join(shown) or '-'}")
    told += [f"not measured, {reason}: {', '.join(names)}" for reason, names in undefined(table)]
    for line in told:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _grid(title: str, rows: Sequence[Row], table: Table) -> object:
    from rich import box
    from rich.table import Table as Grid

    grid = Grid(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    grid.add_column(title, overflow="fold")
    heads = [*(["R act", "z", "%"] if table.num_prompts else []), *table.tensors, "R w", "z", "%"]
    heads += ["joint", "gap"] if table.num_prompts else []
    for head in heads:
        grid.add_column(f" {head}", justify="right", no_wrap=True)
    for row in rows:
        act = [_two(row.r_act), _one(row.z_act), _whole(row.percent_act)] if table.num_prompts else []
        tensors = [_two(row.r_tensors.get(role)) for role in table.tensors]
        weights = [_two(row.r_weights), _one(row.z_weights), _whole(row.percent_weights)]
        both = [_two(row.joint), _two(row.gap)] if table.num_prompts else []
        grid.add_row(row.name, *act, *tensors, *weights, *both)
    return grid


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _one(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
