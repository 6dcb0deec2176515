"""What the demo prints: decisions with their numbers, the ground truth, the cost, the paths."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from weightproof.trackers import worst_measurements
from weightproof.transactions.steps import Cost, Step
from weightproof.types import Measurement, Outcome

if TYPE_CHECKING:
    from weightproof_callbacks.commands.demo_run import DemoResult

WIDTH = 118
MOST_ALARMS = 3
ORDER = (Outcome.FAIL, Outcome.NOT_MEASURED, Outcome.WARN, Outcome.PASS)
STYLES = {"KEEP": "green", "ROLLBACK": "bold red", "HALT": "bold red", "PASS": "green", "FAIL": "red", "WARN": "yellow"}


def action_of(step: Step | None) -> str:
    """What the policy decided; empty for the base model."""
    return "" if step is None or step.decision is None else str(step.decision.action)


def divergence_of(step: Step | None) -> Measurement | None:
    """The judged KL divergence of a step that lies closest to, or farthest beyond, its limit."""
    verdicts = [verdict for verdict in (step.verdicts if step else ()) if verdict.guard == "divergence"]
    judged = [m for v in verdicts for m in v.measurements if m.limit is not None and m.value is not None]
    return max(judged, key=lambda m: m.value or 0.0, default=None)


def worst_matrix(step: Step | None) -> str:
    """The changed matrix that a weight guard blames most, else the one that moved most."""
    record = step.record if step else None
    if step is None or record is None:
        return ""
    moved = {name: delta for name, delta in record.relative_delta.items() if delta is not None}
    blamed = worst_measurements([verdict for verdict in step.verdicts if verdict.guard in ("rmt", "spectral")])
    named = [m.target for m in blamed if m.target in moved]
    return named[0] if named else max(moved, key=lambda name: moved[name])


def show(console: Console, result: DemoResult, *, costs: tuple[Cost, Cost]) -> None:
    """Print decisions, ground truth and cost."""
    console.print("", _decisions(result), "", _truth(result), "", sep="\n")
    before, after = result.digests
    if before:
        same = "equal" if before == after else "NOT EQUAL"
        console.print(f"digest before the rolled back step {before[:16]}…, after the rollback {after[:16]}…: {same}")
    _show_cost(console, result, *costs)


def show_paths(console: Console, result: DemoResult, *, live_dir: Path) -> None:
    """Print where everything lies, relative to the working folder."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for what, path in (
        ("certificate", result.output / "certificate.json"),
        ("event log", result.output / "events.jsonl"),
        ("training evidence", result.output / "training" / "weightproof"),
        ("picture", result.output / "spectra.png"),
        ("offline W&B run", live_dir),
        *((f"model {v.label}", v.folder) for v in result.versions if v.bits_per_byte is not None),
        ("held-out text", result.output / "retain.txt"),
    ):
        table.add_row(what, _relative(path))
    console.print(table)
    _show_commands(console, result)
    verdict = "everything as expected" if not result.failures else f"{len(result.failures)} not as expected"
    console.print(f"done in {result.timings['all']:.0f} s: {verdict}")


def _show_commands(console: Console, result: DemoResult) -> None:
    """Print commands to try on the folders: to certify a change from files alone, and to verify what was certified."""
    program = "weightproof" if shutil.which("weightproof") else _relative(Path(sys.executable).with_name("weightproof"))
    base, text = (_relative(result.output / name) for name in ("base", "retain.txt"))
    console.print("to try next (certify leaves with 0 where the change is kept, 1 where it is rejected):")
    for version in result.versions:
        if version.step is not None and version.bits_per_byte is not None:
            out = _relative(result.output / f"certified-{version.folder.name}")
            certify = f"{program} certify {base} {_relative(version.folder)} --retain {text} -o {out}"
            verify = (
                f"{program} verify {out}/certificate.json --model {_relative(version.folder)} --base {base} "
                f"--retain {text} --level 3 --unsigned-ok"
            )
            for line in (certify, verify):
                console.print(f"  {line}", markup=False, soft_wrap=True)


def _decisions(result: DemoResult) -> Table:
    """One block a step, one line a guard with its worst number."""
    table = _table("decisions: each guard with its worst number")
    for title in ("step", "decision", "guard", "outcome"):
        table.add_column(title, no_wrap=True)
    for title in ("worst matrix or windows", "statistic"):
        table.add_column(title, overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("limit", justify="right", no_wrap=True)
    _add_training(table, result.windows)
    for version in result.versions:
        if version.step is not None:
            _add_step(table, f"{version.step.step} {version.label.split()[0]}", version.step)
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0, show_edge=False)


def _add_training(table: Table, windows: Sequence[Step]) -> None:
    """One line for a training without alarm, one line an alarm otherwise (the first few)."""
    if not windows:
        return
    alarms = [step for step in windows if action_of(step) != "KEEP"]
    for step in alarms[:MOST_ALARMS] or windows[-1:]:
        label = f"{step.step} training" if alarms else f"{windows[0].step}-{step.step} training"
        word = _styled(action_of(step)) + ("" if alarms else f" x{len(windows)}")
        worst = worst_measurements(step.verdicts, 1)
        outcome = [worst[0].guard, _styled(str(worst[0].outcome)), *_cells(worst[0])] if worst else []
        table.add_row(label, word, *outcome)
    if len(alarms) > MOST_ALARMS:
        table.add_row("", f"and {len(alarms) - MOST_ALARMS} more alarms")
    table.add_section()


def _add_step(table: Table, label: str, step: Step) -> None:
    loudest_first = sorted(step.verdicts, key=lambda verdict: ORDER.index(verdict.outcome))
    for position, verdict in enumerate(loudest_first):
        worst = worst_measurements([verdict], 1)
        cells = _cells(worst[0]) if worst else (_short(verdict.reason), "", "", "")
        first = position == 0
        table.add_row(
            label if first else "",
            _styled(action_of(step)) if first else "",
            verdict.guard,
            _styled(str(verdict.outcome)),
            *cells,
        )
    table.add_section()


def _cells(worst: Measurement) -> tuple[str, str, str, str]:
    value = "-" if worst.value is None else f"{worst.value:.3g}"
    limit = "-" if worst.limit is None else f"{worst.limit:.3g}"
    return _short(worst.target), worst.statistic, value, limit


def _short(name: str, width: int = 28) -> str:
    """A target without what all share, cut where it is too long: layer number and role stand at its end."""
    name = name.replace("model.", "").removesuffix(".weight")
    return name if len(name) <= width else f"…{name[1 - width :]}"


def _styled(word: str) -> str:
    style = STYLES.get(word)
    return f"[{style}]{word}[/{style}]" if style else word


def _truth(result: DemoResult) -> Table:
    table = _table("ground truth beside the decisions")
    for title in ("version", "held-out bits/byte", "KL(base || version), nats/token", "limit", "decision"):
        folds = title.startswith("KL")  # only its title is long: a narrow terminal must not cut the decision
        table.add_column(title, justify="left" if title in ("version", "decision") else "right", no_wrap=not folds)
    for version in result.versions:
        reading = divergence_of(version.step)
        table.add_row(
            version.label,
            "-" if version.bits_per_byte is None else f"{version.bits_per_byte:.3f}",
            "-" if reading is None else f"{reading.value:.3g}",
            "-" if reading is None else f"{reading.limit:g}",
            _styled(action_of(version.step)),
        )
    return table


def _show_cost(console: Console, result: DemoResult, training: Cost, edits: Cost) -> None:
    seconds = result.timings["training"]
    console.print(
        f"guard in training: {training.seconds:.1f} s of {seconds:.0f} s ({100 * training.seconds / seconds:.1f} %), "
        f"{training.checks} checks, snapshot {training.snapshot_bytes / 2**20:.1f} MiB, "
        f"baseline {training.baseline_bytes / 2**20:.1f} MiB"
    )
    console.print(
        f"guard on the edits: baseline {edits.baseline_seconds:.1f} s, {edits.checks} checks "
        f"{edits.check_seconds:.1f} s, snapshot {edits.snapshot_bytes / 2**20:.1f} MiB"
    )


def _relative(path: Path) -> str:
    return os.path.relpath(path)
