"""What was measured, with what it was measured on, as JSON, CSV and one self-contained page."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from markupsafe import escape as markup_escape

from weightproof.delta_report.picture import table_png
from weightproof.delta_report.stability import Stability
from weightproof.delta_report.table import Row, Table
from weightproof.folders.files import make_folders, write_atomically
from weightproof.reporting import words

if TYPE_CHECKING:
    from jinja2 import Environment

FORMAT = "weightproof-delta-report-v1"
FILES = ("report.json", "report.csv", "report.png", "report.html")
_GROUPS = (
    ("write", "What writes, and what is mixed", ("write", "mixed")),
    ("read", "What reads", ("read",)),
    ("ceilings", "Ceilings", ("ceiling",)),
)


@dataclass(frozen=True)
class Report:
    """A subspace report.

    Attributes:
        title: What the change is, and of which model.
        table: What was measured.
        change: What the delta says of itself: source, base, mode, sides, norms.
        stability: Over halves of the prompts, over changes of other seeds; as far as it was asked for.
    """

    title: str
    table: Table
    change: Mapping[str, Any]
    stability: tuple[Stability, ...] = field(default_factory=tuple)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        table = self.table
        return {
            "format": FORMAT,
            "title": self.title,
            "change": dict(self.change),
            "layers": list(table.layers),
            "tensors": list(table.tensors),
            "d_model": table.width,
            "rank": table.rank,
            "broad_rank": table.broad_rank,
            "num_prompts": table.num_prompts,
            "rows": [row.to_dict() for row in table.rows],
            "stability": [one.to_dict() for one in self.stability],
        }

    def save(self, folder: Path) -> tuple[Path, ...]:
        """Write table, picture and page; each file the old or the new one at any time.

        Raises:
            InputError: The folder cannot be made or written.
        """
        make_folders(folder)
        png = table_png(self.table, self.title)
        content = (
            json.dumps(self.to_dict(), indent=1, allow_nan=False).encode(),
            as_csv(self.table).encode(),
            png,
            page(self, png).encode(),
        )
        for name, data in zip(FILES, content, strict=True):
            write_atomically(folder / name, data)
        return tuple(folder / name for name in FILES)


# ---------------------------------------------------------------- CSV


def as_csv(table: Table) -> str:
    """One line a candidate; what was not measured is empty. The last column says why, or that an interval is rough."""
    numbers = [key for key, value in Row.__annotations__.items() if value == "float | None"]
    heads = ["candidate", "family", "axis_kind", "rank", "layers", *numbers]
    heads += [f"{kind} {role}" for kind in ("r_tensor", "percent_tensor") for role in table.tensors]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*heads, "reasons"])
    for row in table.rows:
        line: list[object] = [row.name, row.family, row.axis_kind, row.rank or "", row.layers]
        line += [_cell(getattr(row, key)) for key in numbers]
        line += [_cell(found.get(role)) for found in (row.r_tensors, row.percent_tensors) for role in table.tensors]
        writer.writerow([*line, "; ".join(f"{key}: {why}" for key, why in row.reasons.items())])
    return text.getvalue()


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


# ---------------------------------------------------------------- page


def page(report: Report, png: bytes) -> str:
    """The page: no script, no address outside of itself."""
    table = report.table
    groups = [(key, title, rows) for key, title, kinds in _GROUPS if (rows := table.of(*kinds))]
    return (
        _environment()
        .get_template("delta_report.html.j2")
        .render(
            report=report,
            table=table,
            groups=groups,
            lead=lead(table),
            sides=sides(report.change),
            picture=Markup(base64.b64encode(png).decode()),
            gaps=_gaps(table),
            rough=next((row.reasons["r_act_low"] for row in table.rows if "r_act_low" in row.reasons), None),
            undefined=undefined(table),
        )
    )


@cache
def _environment() -> Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("weightproof", "data"), autoescape=True, trim_blocks=True
    )
    environment.filters["breakable"] = lambda name: Markup(
        str(markup_escape(str(name))).replace("_", "_<wbr>").replace(".", ".<wbr>")
    )
    environment.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    environment.globals.update(words=words, num=_number, fixed=_fixed)
    return environment


def _number(value: float | None, digits: int = 3) -> str:
    return "\u2013" if value is None else words.number(value, digits)


def _fixed(value: float | None, places: int = 2) -> str:
    """With so many places, as numbers in a column are read."""
    return "\u2013" if value is None else f"{value:z.{places}f}".replace("-", words.MINUS)


def lead(table: Table) -> str:
    """The result in a few sentences, for somebody who has not seen such a table."""
    guesses = table.of("write", "mixed")
    if not guesses:
        return "No candidate that writes or is mixed is defined here."
    best = guesses[0]
    parts = [f"\u201c{best.name}\u201d holds the most of this change among candidates that write or are mixed:"]
    found = []
    if best.r_weights is not None:
        found.append(
            f"on weights {words.number(best.r_weights)} times what a random subspace of its size holds"
            f"{_deviations(best.z_weights)}, {_fixed(best.percent_weights, 0)} per cent of the best there is"
        )
    if best.r_act is not None:
        found.append(f"on activations {words.number(best.r_act)} times{_deviations(best.z_act)}")
    parts.append("; ".join(found) + ".")
    if table.num_prompts == 0:
        parts.append("Activations were not measured: no prompts were given.")
    return " ".join(parts)


def _deviations(z: float | None) -> str:
    return "" if z is None else f" ({_fixed(z, 1)} standard deviations from chance)"


def sides(change: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The diagnostics of a contrast, as names and numbers; empty for one side alone."""
    found = change.get("sides") or {}
    cosine = found.get("cosine")
    told = (
        ("cosine of one side and the other turned round", None if cosine is None else -cosine),
        ("length of the positive side over the negative", found.get("norm_ratio")),
        ("drift: what both have in common over what they differ in", found.get("drift_ratio")),
        ("cosine of the contrast and the drift", found.get("drift_cosine")),
    )
    return [(name, _number(value)) for name, value in told] if found else []


def _gaps(table: Table) -> list[tuple[str, str]]:
    """Why whole columns are missing."""
    names = {"r_act": "activations", "r_weights": "weights", "specific_act": "specificity"}
    rows = [row for row in table.rows if "basis" not in row.reasons]
    found: list[tuple[str, str]] = []
    for key, name in names.items():
        reasons = {row.reasons[key] for row in rows if key in row.reasons}
        if reasons and all(key in row.reasons for row in rows):
            found.append((name, sorted(reasons)[0]))
    return found


def undefined(table: Table) -> list[tuple[str, list[str]]]:
    """Reason -> candidates that are not defined for it."""
    names, groups = {row.name for row in table.rows}, dict[str, list[str]]()
    for row in table.undefined:
        part, _, inner = row.reasons["basis"].partition(": ")  # of a compound, the part of it that is missing
        groups.setdefault(inner if part in names else row.reasons["basis"], []).append(row.name)
    return list(groups.items())
