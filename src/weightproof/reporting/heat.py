"""The heat map of a report: how much each matrix changed, layer by layer.

It is a table whose cells are coloured, so that a screen reader reads what the eye sees.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from weightproof.reporting.words import MINUS

LEVELS = (0.001, 0.01, 0.05, 0.2, 0.5, 1.0)
"""Lower ends of the colour steps 1 to 6, as ||W' - W|| / ||W||; below the first, and unchanged, is step 0."""
_FLOW = (
    {"q", "query"},
    {"k", "key"},
    {"v", "value"},
    {"attn", "qkv"},
    {"o", "out"},
    {"router", "gate"},
    {"up", "fc1", "fc", "wi", "intermediate"},
    {"down", "fc2", "wo", "output"},
)
_EXPERT = re.compile(r"\[\d+\]")
_LAYER = re.compile(r"(?<!\w)\d+(?!\w)")


@dataclass(frozen=True)
class Cell:
    """One change: its number in per cent, its colour step, and how many matrices it stands for (the largest)."""

    text: str
    level: int
    count: int = 1
    value: float = 0.0


@dataclass(frozen=True)
class Stack:
    """The layers of one stack: a title, the columns, and (layer, cells) where a missing matrix is None."""

    title: str
    roles: tuple[str, ...]
    rows: tuple[tuple[int, tuple[Cell | None, ...]], ...]


@dataclass(frozen=True)
class HeatMap:
    """Stacks of layers, and what lies outside of them by name."""

    stacks: tuple[Stack, ...]
    outside: tuple[tuple[str, Cell], ...]

    @property
    def legend(self) -> tuple[tuple[int, str], ...]:
        """Colour step and what it stands for."""
        ends = [f"{100 * end:g}" for end in LEVELS]
        steps = [f"below {ends[0]}", *(f"{low}\u2013{high}" for low, high in itertools.pairwise(ends))]
        return tuple(enumerate([*steps, f"{ends[-1]} and more"]))


def heat_map(deltas: Mapping[str, Any], unchanged: Iterable[str] = ()) -> HeatMap:
    """Sort relative changes by stack, layer and role.

    Args:
        deltas: Matrix name to ||W' - W|| / ||W||; None where W was zero before.
        unchanged: Names of the other measured matrices.
    """
    stacks: dict[str, dict[int, dict[str, Cell]]] = {}
    outside: dict[str, Cell] = {}
    for name, delta in {**dict.fromkeys(unchanged, 0.0), **deltas}.items():
        bare = _EXPERT.sub("", name).removesuffix(".weight")
        found = _LAYER.search(bare)
        cell = _cell(delta)
        if found is None:
            outside[bare] = _worse(outside.get(bare), cell)
            continue
        role = bare[found.end() :].strip(".") or "weight"
        row = stacks.setdefault(bare[: found.start()].strip("."), {}).setdefault(int(found.group()), {})
        row[role] = _worse(row.get(role), cell)
    return HeatMap(tuple(_stack(title, layers) for title, layers in stacks.items()), tuple(outside.items()))


def _stack(title: str, layers: Mapping[int, Mapping[str, Cell]]) -> Stack:
    roles = sorted({role for row in layers.values() for role in row}, key=_order)
    short = _short(roles)
    rows = tuple((layer, tuple(layers[layer].get(role) for role in roles)) for layer in sorted(layers))
    return Stack(title, tuple(short), rows)


def _order(role: str) -> tuple[int, str]:
    """In the order in which data passes: attention in, attention out, then the feed-forward part."""
    parts = re.split(r"[._]", role.lower())
    found = (place for place, words in enumerate(_FLOW) if words & set(parts))
    return next(found, len(_FLOW)), role


def _short(roles: list[str]) -> list[str]:
    """The last component of each role, as many as it takes to tell them apart."""
    for keep in range(1, 6):
        short = [".".join(role.split(".")[-keep:]) for role in roles]
        if len(set(short)) == len(set(roles)):
            return short
    return roles


def _cell(delta: Any) -> Cell:
    if not isinstance(delta, int | float) or not math.isfinite(delta):
        # From zero, or to what is not finite: beyond every step.
        return Cell("new" if delta is None else "NaN", len(LEVELS), value=math.inf)
    level = sum(delta >= end for end in LEVELS)
    return Cell(_percent(delta), level, value=float(delta))


def _percent(delta: float) -> str:
    shown = 100 * delta
    if shown == 0:
        return "0"
    if shown < 0.01:
        return f"<{0.01:g}"
    text = f"{shown:.0f}" if shown >= 9.95 else f"{shown:.2g}"
    return f"{shown:.0e}".replace("e+0", "e").replace("e+", "e") if shown >= 99999 else text.replace("-", MINUS)


def _worse(old: Cell | None, new: Cell) -> Cell:
    if old is None:
        return new
    worst = max(old, new, key=lambda cell: cell.value)
    return Cell(worst.text, worst.level, old.count + 1, worst.value)
