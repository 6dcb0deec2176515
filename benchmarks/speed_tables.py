"""The rows of the speed benchmark in order, and the tables that are made of them. Standard library alone.

A row was measured, failed (with its error) or was not run (with the reason); nothing else is ever put into a cell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

OURS = "weightproof"
INVARLOCK, RMT, WATCHER = "invarlock 0.12.1", "invarlock 0.2.0", "weightwatcher 0.7.7"
MODELS = {
    "124m": "GPT-2 small (124 M parameters, float32)",
    "1b": "a Llama of 1.04 B parameters (16 blocks of width 2048, float32)",
}
MiB, GiB = 1 << 20, 1 << 30
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """One row.

    Attributes:
        name: Key of its result.
        job: What measures it (`speed_rows.py`).
        what: Words for the reader.
        tool: Whose it is; "" for plain torch.
        against: Our row that comes nearest to a peer's, for the ratio.
        on_host: Whether it reads files and runs on the host whatever the device is.
    """

    name: str
    job: str
    what: str
    tool: str = OURS
    against: str = ""
    on_host: bool = False


LINES = (
    Line("read", "read", "one read of all weights (`torch.linalg.vector_norm`)", ""),
    Line("svdvals", "svdvals", "`torch.linalg.svdvals` of every matrix", "", "spectra"),
    Line("spectra", "spectra", "exact spectra of every matrix"),
    Line("fits", "fits", "exact spectra, power laws and Marchenko-Pastur fits of every matrix"),
    Line("baseline", "baseline", "baseline: `GuardSession(model)`"),
    Line("snapshot", "snapshot", "snapshot in memory"),
    Line("check_weights", "check_weights", "full check after an int8 edit, weights only"),
    Line("check_outputs", "check_outputs", "full check after an int8 edit, with outputs on random tokens"),
    Line("guarded_edit", "check_outputs", "the same with snapshot, proofs and decision around it"),
    Line("certify", "certify", "certify two folders by their weights", on_host=True),
    Line("certificate", "certify", "write the certificate", on_host=True),
    Line("verify_1", "verify_1", "verify, level 1", on_host=True),
    Line("verify_2", "verify_2", "verify, level 2", on_host=True),
    Line("invarlock_prepare", "invarlock", "four guards: prepare", INVARLOCK, "baseline"),
    Line("invarlock_check", "invarlock", "four guards: check after the int8 edit", INVARLOCK, "check_outputs"),
    Line("rmt_prepare", "invarlock_rmt", "guard rmt: prepare", RMT, "fits"),
    Line("rmt_check", "invarlock_rmt", "guard rmt: check after the int8 edit", RMT, "check_weights"),
    Line("weightwatcher", "weightwatcher", "`analyze()`, once", WATCHER, "fits"),
)
JOBS = tuple(dict.fromkeys(line.job for line in LINES))
TOOL_OF = {line.job: line.tool for line in LINES}


def lines_for(device: str) -> tuple[Line, ...]:
    """The rows that say something about a device."""
    return tuple(line for line in LINES if device == "cpu" or not line.on_host)


def is_measured(row: Row | None) -> TypeGuard[Row]:
    """Whether there is a number."""
    return row is not None and row.get("status") == "measured"


def whole_seconds(row: Row, clock: str = "processor_seconds") -> float:
    """Seconds for all blocks, where one stood for them; of the processor, which other work on a machine moves least."""
    return row[clock] * row.get("times", 1)


# ---------------------------------------------------------------- cells


def _number(value: float) -> str:
    """Three figures; thousands in groups."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.001 else f"{value:.1g}"


def _size(count: int | None) -> str:
    if count is None:
        return "not measured"
    return f"{count / GiB:.2f} GiB" if count >= GiB else f"{count / MiB:,.0f} MiB"


def _seconds(row: Row) -> str:
    times, said = row.get("times", 1), _number(whole_seconds(row, "seconds"))
    notes = [f"x{times} from one block: {_number(row['seconds'])}"] if times > 1 else []
    notes += [row["note"]] if "note" in row else []
    return f"{said} ({'; '.join(notes)})" if notes else said


def _why_not(row: Row | None) -> str:
    if row is None:
        return "not run"
    reason = str(row["reason"]).replace("|", "/")
    return f"not run: {reason}" if row["status"] == "not run" else f"failed: {reason}"


def _ratio(line: Line, rows: Mapping[str, Any]) -> str:
    """Ours over theirs, unless ours was measured on less of the model."""
    ours, theirs = rows.get(line.against), rows[line.name]
    if not is_measured(ours) or ours.get("times", 1) > theirs.get("times", 1):
        return ""
    what = next(one.what for one in LINES if one.name == line.against).split(":")[0].partition(" after ")[0]
    return f"{_number(whole_seconds(ours) / whole_seconds(theirs))} ({what})"


def _cells(line: Line, rows: Mapping[str, Any], device: str) -> list[str]:
    row, read = rows.get(line.name), rows.get("read")
    if not is_measured(row):
        return [_why_not(row), "", "", "", ""]
    reads = _number(whole_seconds(row) / whole_seconds(read)) if is_measured(read) else "not measured"
    memory = _size(row["peak_bytes"])
    if device != "cpu":
        memory = f"{_size(row.get('device_peak_bytes'))}, host {memory}"
    return [_seconds(row), _number(whole_seconds(row)), reads, _ratio(line, rows), memory]


def table(rows: Mapping[str, Any], device: str) -> str:
    """Markdown of one model."""
    head = ["", "tool", "seconds", "of the processor", "in reads", "ours / theirs", "peak memory"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for line in lines_for(device):
        lines.append(f"| {' | '.join([line.what, line.tool or 'torch', *_cells(line, rows, device)])} |")
    return "\n".join(lines)


# ---------------------------------------------------------------- pages


def _busy(rows: Mapping[str, Any]) -> float:
    """Wall over processor seconds of all rows together: 1 where nothing else ran and nothing waited."""
    measured = [row for row in rows.values() if is_measured(row)]
    processor = sum(row["processor_seconds"] for row in measured)
    return sum(row["seconds"] for row in measured) / processor if processor else 1.0


def text(report: Mapping[str, Any]) -> str:
    """All tables of one report, with what they were measured on."""
    made, device = report["made"], report["made"]["device"]
    command = "make benchmark-speed" if device == "cpu" else f"make benchmark-speed DEVICE={device}"
    parts = []
    for model, rows in report["rows"].items():
        parts += [f"**{MODELS[model][0].upper()}{MODELS[model][1:]}**", table(rows, device)]
        if device == "cpu":
            parts.append(f"Wall over processor seconds, all rows together: {_busy(rows):.2f}.")
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    parts.append(
        f"`{command}` on {made['machine']}, {made['threads']} thread, {made['at_once']} rows at once; {versions}."
    )
    return "\n\n".join(parts)


def with_tables(page: str, report: Mapping[str, Any]) -> str:
    """The page with the tables between its two marks.

    Raises:
        ValueError: It has no such marks.
    """
    begin, end = f"<!-- speed on {report['made']['device']}: benchmarks/speed_peers.py -->", "<!-- end -->"
    head, mark, rest = page.partition(begin)
    if not mark or end not in rest:
        raise ValueError(f"the page has no place for the tables: {begin} ... {end}")
    return f"{head}{begin}\n\n{text(report)}\n\n{rest[rest.index(end) :]}"
