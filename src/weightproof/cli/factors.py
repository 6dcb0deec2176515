"""`weightproof factors`: Kronecker factors of a model's curvature, fitted on text, merged and shown."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weightproof.errors import InputError

if TYPE_CHECKING:
    from weightproof.curvature import Factors

app = typer.Typer(
    help="Fit, merge and show Kronecker factors (K-FAC) of a model's curvature.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command()
def fit(  # noqa: PLR0913, PLR0917 - one option a line
    model: Annotated[str, typer.Argument(help="Model folder (or Hub id).")],
    data: Annotated[Path, typer.Option(help="Text or JSONL; best a sample of what the model was trained on.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write (.safetensors), or a folder.")],
    include: Annotated[list[str] | None, typer.Option(help="Glob of matrices or families; may be repeated.")] = None,
    labels: Annotated[str, typer.Option(help="sampled (from the model) or empirical (those of the data).")] = "sampled",
    seed: Annotated[int, typer.Option(help="Of the sampled labels.")] = 0,
    max_tokens: Annotated[int | None, typer.Option(help="Read no more of the data.")] = None,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Windows per batch.")] = 8,
    memory: Annotated[float, typer.Option(help="GiB for factors at once; more take several passes.")] = 8.0,
    correct: Annotated[bool, typer.Option("--ekfac", help="Fit corrected eigenvalues too (one more pass).")] = False,
    resume: Annotated[Path | None, typer.Option(help="Factors of the first part of the same data.")] = None,
    checkpoint_every: Annotated[int, typer.Option(help="Batches between two writes of --out; 0: only at the end.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and stop.")] = False,
    device: Annotated[str, typer.Option(help="Where the model is run, as torch names it.")] = "cpu",
) -> None:
    """Fit factors of attention and feed-forward matrices (or of --include) on text, and write them."""
    from weightproof.curvature import fit_factors
    from weightproof.curvature.factors import Factors
    from weightproof.curvature.fitting import correct_eigenvalues, fit_cost
    from weightproof.curvature.text_batches import TextBatches
    from weightproof.folders.loading import load_model, resolve_folder

    _require_place(out)
    before = None if resume is None else Factors.load(resume)
    loaded = load_model(resolve_folder(model), device=device)
    max_bytes = int(memory * 2**30)
    cost = fit_cost(loaded.model, include or None, max_bytes=max_bytes)
    sys.stdout.write(f"{cost}\n")
    for name, reason in cost.refused.items():
        sys.stdout.write(f"no factors for {name}: {reason}\n")
    if dry_run:
        return
    batches = TextBatches(data, loaded.encode, length, batch_size, max_tokens)
    factors = fit_factors(
        loaded.model, batches, include or None, labels, seed, max_bytes=max_bytes, resume=before,
        checkpoint=out if checkpoint_every else None, checkpoint_every=max(1, checkpoint_every),
    )  # fmt: skip
    if correct:
        factors = correct_eigenvalues(factors, loaded.model, batches)
    path = factors.save(out)
    _show(factors)
    sys.stdout.write(f"written to {path}\n")


@app.command()
def merge(
    parts: Annotated[list[Path], typer.Argument(help="Two or more files of factors, of the same model.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write (.safetensors), or a folder.")],
) -> None:
    """Add up factors that were fitted on different parts of the data."""
    from weightproof.curvature.factors import Factors

    if len(parts) < 2:
        raise InputError("give two or more files of factors to merge")
    _require_place(out)
    merged = Factors.load(parts[0])
    for part in parts[1:]:
        merged = merged.merge(Factors.load(part))
    path = merged.save(out)
    _show(merged)
    sys.stdout.write(f"written to {path}\n")


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="Folder that the other program wrote.")],
    program: Annotated[str, typer.Option("--from", help="kronfluence or bergson.")],
    model: Annotated[str, typer.Option(help="Model folder (or Hub id) that they were fitted at.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write (.safetensors), or a folder.")],
) -> None:
    """Read factors that kronfluence or bergson fitted, check that they fit the model, and write them."""
    from weightproof.curvature.importers import import_factors
    from weightproof.folders.loading import load_model, resolve_folder

    _require_place(out)
    factors = import_factors(folder, program, load_model(resolve_folder(model)).model)
    path = factors.save(out)
    _show(factors)
    sys.stdout.write(f"read from {program}, bound to the weights of {model}, written to {path}\n")


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="A file of factors.")],
    model: Annotated[str | None, typer.Option(help="Check that they belong to the weights of this folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show what factors were fitted on, and each matrix's tokens and traces."""
    from weightproof.curvature.factors import Factors

    factors = Factors.load(path)
    if model is not None:
        from weightproof.folders.loading import load_model, resolve_folder

        factors.require_weights(load_model(resolve_folder(model)).model)
    if not as_json:
        _show(factors)
        if model is not None:
            sys.stdout.write("they belong to these weights\n")
        return
    rows = {
        name: {
            "tokens": one.tokens,
            "d_out": len(one.gradient_sum),
            "d_in": len(one.activation_sum),
            "activation_trace": float(one.activation_covariance.trace()),
            "gradient_trace": float(one.gradient_covariance.trace()),
            "corrected": one.corrected_sum is not None,
            "weight_digest": one.weight_digest,
        }
        for name, one in factors.by_name.items()
    }
    content = {"digest": factors.digest, "source": vars(factors.source), "factors": rows}
    sys.stdout.write(json.dumps(content, indent=2, allow_nan=False) + "\n")


def _show(factors: Factors) -> None:
    from rich import box
    from rich.table import Table

    from weightproof.cli.decision_view import open_console

    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("matrix", overflow="fold")
    for head in ("shape", "tokens", "tokens/dim", "tr A", "tr G"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, one in factors.by_name.items():
        table.add_row(
            name,
            f"{len(one.gradient_sum)}x{len(one.activation_sum)}",
            f"{one.tokens:,}",
            f"{one.tokens_per_dimension:.1f}",
            f"{float(one.activation_covariance.trace()):.3g}",
            f"{float(one.gradient_covariance.trace()):.3g}",
        )
    source = factors.source
    console = open_console()
    console.print(table)
    console.print(
        f"{source.loss} loss, {source.labels} labels (seed {source.seed}), {source.batches} batches, "
        f"data {source.data_digest[:12]}, factors {factors.digest[:12]}",
        soft_wrap=True, markup=False, highlight=False,
    )  # fmt: skip


def _require_place(out: Path) -> None:
    """Refuse a place that cannot be written before the work begins."""
    folder = out.parent if out.suffix == ".safetensors" else out
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: name a folder, or a file that ends in .safetensors")
    above = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"{folder} cannot be written: {above} is a file, or may not be written to")
