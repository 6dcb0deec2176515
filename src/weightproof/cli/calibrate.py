"""`weightproof calibrate`: limits fitted on random benign edits of a model, with a stated level of false alarms."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightproof.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from weightproof.calibration.calibrating import Calibration


def calibrate(  # noqa: PLR0913, PLR0917 - one option a line
    model: Annotated[str | None, typer.Argument(help="Model folder (or Hub id); not with --from.")] = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Policy file to write; the draws go beside it.")
    ] = Path("calibrated.yaml"),
    retain: Annotated[
        Path | None, typer.Option(help="Text or JSONL: half of it tells the truth about each edit.")
    ] = None,
    tier: Annotated[str | None, typer.Option(help="Tier that is extended (default balanced).")] = None,
    draws: Annotated[int | None, typer.Option(help="How many edits; by default as many as are likely enough.")] = None,
    false_alarms: Annotated[
        float | None, typer.Option(help="Share of benign edits that may break any limit (default .05).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    source: Annotated[
        Path | None, typer.Option("--from", help="Fit again from a .draws.json, without a model.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
    device: Annotated[str, typer.Option(help="Where the model is run, as torch names it.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print limits and how they are judged as JSON.")] = False,
) -> None:
    """Fit limits on random edits that are known to be benign, and write them as a policy with its evidence."""
    if (model is None) == (source is None):
        raise InputError("name a model to calibrate, or draws to fit again with --from (one of the two)")
    from weightproof.calibration.output import check_output, save

    check_output(output, force=force, source=source)
    command = shlex.join(["weightproof", *sys.argv[1:]]) if sys.argv[1:2] == ["calibrate"] else "weightproof calibrate"
    if source is not None:
        from weightproof.calibration.calibrating import refit

        found = refit(source, tier=tier, false_alarms=false_alarms, command=command)
    else:
        assert model is not None
        options = {"tier": tier or "balanced", "draws": draws, "seed": seed, "command": command}
        options |= {} if false_alarms is None else {"false_alarms": false_alarms}
        found = _drawn(model, retain, device, output, options)
    policy, beside = save(found, output, force=True)  # refused above, before anything long
    if as_json:
        told = {"policy": policy.as_posix(), "draws": beside.as_posix(), **_fit_json(found)}
        sys.stdout.write(json.dumps(told, indent=2, allow_nan=False) + "\n")
    else:
        show(found, policy, beside)


def _drawn(model: str, retain: Path | None, device: str, output: Path, options: dict[str, Any]) -> Calibration:
    """Load the model, draw what is not yet in the journal, fit; the journal goes when all is fitted."""
    from tqdm import tqdm

    from weightproof.calibration.calibrating import calibrate as carry_out
    from weightproof.calibration.conformal import draws_needed
    from weightproof.calibration.output import journal_path
    from weightproof.folders.loading import load_model, resolve_folder
    from weightproof.losses import LossData

    draws_needed(options.get("false_alarms", 0.05))  # refuses a share that is none, before anything is loaded
    if options["draws"] is not None and options["draws"] < 1:
        raise InputError(f"--draws must be at least 1, not {options['draws']}")
    loaded = load_model(resolve_folder(model), device=device)
    data = None if retain is None else LossData(retain, encode=loaded.encode)
    journal = journal_path(output)
    with tqdm(desc="draws", unit="edit", disable=None, leave=False) as bar:

        def advance(done: int, wanted: int) -> None:
            bar.total, bar.n = wanted, done
            bar.refresh()

        found = carry_out(loaded.model, retain=data, journal=journal, on_draw=advance, **options)
    journal.unlink(missing_ok=True)
    return found


# ---------------------------------------------------------------- what is shown


def show(found: Calibration, policy: Path, beside: Path) -> None:
    """Limits, old and new, and what draws that fixed none of them say of them."""
    from weightproof.cli.decision_view import open_console

    console = open_console()
    fit, counts = found.fit, found.fit.counts
    known = "truth measured" if found.provenance.data_digest else "harmless by construction"
    console.print(
        f"{len(found.draws)} edits drawn ({known}): {counts['benign']} benign, {counts['harmful']} harmful for a "
        f"perplexity ratio of {fit.tau:g}, {counts['grey']} left open",
        soft_wrap=True,
    )
    for note in found.provenance.notes:
        console.print(f"note: not drawn: {note}", soft_wrap=True, markup=False)
    console.print("", _limit_table(found), "", _judged_table(found), "")
    console.print(fit.in_words, soft_wrap=True)
    console.print(f"policy {policy}, draws {beside}", soft_wrap=True, markup=False)


def _limit_table(found: Calibration) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        title=f"limits of {found.fit.tier}", title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False
    )
    table.add_column("limit")
    for head in ("was", "now"):
        table.add_column(head, justify="right", overflow="fold")
    for guard, keys in found.fit.limits.items():
        for key, value in keys.items():
            table.add_row(f"{guard} {key}  ", f"{_value(found.tier.limits[guard].get(key))}  ", _value(value))
    return table


def _value(value: Any) -> str:
    if isinstance(value, dict):
        rest = [f"{family} {number:.3g}" for family, number in value.items() if family != "default"]
        return ", ".join([f"{value['default']:.3g}", *rest])
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _judged_table(found: Calibration) -> Table:
    from rich import box
    from rich.table import Table

    title = "judged on draws that fixed no limit"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("guard  ")
    for head in ("benign flagged  ", "harmful found"):
        table.add_column(head, justify="right")
    for one in found.fit.judged:
        table.add_row(one.guard, f"{one.flagged} of {one.benign}  ", f"{one.found} of {one.harmful}")
    return table


def _fit_json(found: Calibration) -> dict[str, Any]:
    from dataclasses import asdict

    return {"num_draws": len(found.draws), "notes": list(found.provenance.notes), "fit": asdict(found.fit)}
