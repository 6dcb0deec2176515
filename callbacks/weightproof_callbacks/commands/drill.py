"""`weightproof drill`: inject faults into a few steps of training of one's own model, and see what the guard does."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightproof.cli.certify import check_output
from weightproof.errors import InputError
from weightproof.folders.loading import resolve_folder

if TYPE_CHECKING:
    from weightproof.testing.drill import Procedure, Row

RESULT = "drill.json"
# What one process has nothing of, and why.
NEEDS = {
    "stuck-rank": "needs a second process",
    "desynchronised": "needs a second process",
    "loader-skew": "needs a second process",
    "stale-masters": "needs an optimizer with master weights",
}


def drill(  # noqa: PLR0913, PLR0917 - one option a line
    model: Annotated[str, typer.Argument(help="Folder of a causal language model. Only copies of it are trained.")],
    data: Annotated[Path | None, typer.Option(help="Text or JSONL to train on; else generated tokens.")] = None,
    steps: Annotated[int, typer.Option(min=5, help="Steps after the fault.")] = 50,
    faults: Annotated[str | None, typer.Option(help="Names, separated by commas; all by default.")] = None,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Of AdamW.")] = 5e-4,
    window: Annotated[int, typer.Option(min=8, help="Tokens of a window.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Seed of data, generators and faults.")] = 0,
    output: Annotated[Path | None, typer.Option("-o", "--output", help=f"Folder for {RESULT}.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Drill the guard on a model. Exit code 0: all as expected, 1: a fault got through or health was acted on."""
    from weightproof.testing.drill import Procedure

    names = _chosen(faults)
    if output is not None:
        check_output(output)
    procedure = Procedure(after=steps, window=window, learning_rate=learning_rate, seed=seed)
    rows, not_run = _rows(resolve_folder(model), data, names, procedure)
    content = {
        "rows": [row.to_json() for row in rows],
        "not_run": not_run,
        "as_expected": all(row.expected for row in rows),
    }
    if output is not None:
        from weightproof.folders.files import write_atomically

        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / RESULT, json.dumps(content, indent=1).encode())
    if as_json:
        typer.echo(json.dumps(content, indent=1))
    else:
        _show(rows, not_run)
    if not content["as_expected"]:
        raise typer.Exit(1)


def _chosen(asked: str | None) -> list[str]:
    """Names of faults, checked before anything long.

    Raises:
        InputError: One is unknown, or needs what one process does not have.
    """
    from weightproof.testing.faults import REGISTRY, make_fault

    if asked is None:
        return list(REGISTRY)
    names = [name.strip() for name in asked.split(",") if name.strip()]
    if not names:
        raise InputError(f"--faults names none: choose from {', '.join(sorted(REGISTRY))}")
    for name in names:
        make_fault(name)
        if name in NEEDS:
            raise InputError(f"the fault {name!r} cannot be drilled here: it {NEEDS[name]}")
    return names


def _rows(folder: Path, data: Path | None, names: list[str], procedure: Procedure) -> tuple[list[Row], dict[str, str]]:
    from accelerate import Accelerator
    from tqdm import tqdm

    from weightproof.folders.loading import load_model
    from weightproof.testing.faults import make_fault
    from weightproof_callbacks.fault_drill import Drill

    loaded = load_model(folder)
    accelerator = Accelerator(cpu=True)
    the_drill = Drill(accelerator, loaded.model, _windows(loaded, data, procedure), procedure)
    planned = [make_fault(name, at=procedure.fault_at, seed=procedure.seed) for name in names if name not in NEEDS]
    planned = [one for fault in planned for one in ((fault,) if fault.weaker is None else (fault, fault.mild()))]
    rows: list[Row] = []
    with _quiet(), tqdm(total=1 + len(planned), desc="drill", unit="run", file=sys.stderr) as bar:
        rows.append(the_drill.clean_row())
        bar.update()
        for fault in planned:
            bar.set_postfix_str(fault.name)
            rows.append(the_drill.row(fault))
            bar.update()
    return rows, {name: NEEDS[name] for name in names if name in NEEDS}


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of the guard inside: a drill rejects on purpose, again and again."""
    logger = logging.getLogger("weightproof")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _windows(loaded: Any, data: Path | None, procedure: Procedure) -> Any:
    """Windows of the file, else of tokens that have something to learn in them."""
    from weightproof_callbacks.fault_drill import learnable_windows, text_windows

    count = (procedure.batches + 4) * procedure.batch_size
    if data is None:
        vocabulary = getattr(getattr(loaded.model, "config", None), "vocab_size", None)
        if not isinstance(vocabulary, int):
            raise InputError("the model does not say how many tokens it knows: give it text with --data")
        return learnable_windows(vocabulary, count, procedure.window, procedure.seed)
    from weightproof.folders.text_data import read_examples

    ids: list[int] = []
    for example in read_examples(data, loaded.encode, name="data"):
        ids += [int(token) for token in example["input_ids"]]
        if len(ids) >= count * procedure.window:
            break
    return text_windows(ids, count, procedure.window)


def _show(rows: list[Row], not_run: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    from weightproof.testing.drill import HARMFUL, table

    heads, *lines = table(rows)
    view = Table(title="faults, without and under guard", title_justify="left", box=None, pad_edge=False)
    for head in heads:
        view.add_column(head, overflow="fold")
    for line in lines:
        view.add_row(*line)
    console = Console(highlight=False, emoji=False, width=None if Console().is_terminal else 200)
    console.print(view)
    console.print(
        f"harm: loss without a guard above the clean twin's, nats; more than {HARMFUL:g} is harmful. "
        "loss: the same under guard."
    )
    for name, reason in not_run.items():
        console.print(f"not run: {name}: {reason}")
    surprises = sum(not row.expected for row in rows)
    console.print("all as expected" if not surprises else f"{surprises} not as expected")
