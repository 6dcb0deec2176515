"""How far the scores depend on what was drawn: which prompts make a basis, which run of training made the change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from statistics import fmean, stdev
from typing import Any

import numpy as np
from scipy.stats import rankdata

from weightproof.delta_report.table import Row, Table


@dataclass(frozen=True)
class Spread:
    """One score of one candidate over several tables; None where some table has none.

    Attributes:
        mean: Over the tables.
        std: Standard deviation over them.
    """

    mean: float | None
    std: float | None


@dataclass(frozen=True)
class Stability:
    """What several tables of the same candidates agree on.

    Attributes:
        what: What differs between them: "halves of the prompts", or "changes".
        num_tables: How many there are.
        r_act: By candidate.
        r_weights: By candidate.
        order_act: Mean Spearman correlation, over pairs of tables, of the order in which R_act puts candidates.
        order_weights: The same for balanced R_w.
    """

    what: str
    num_tables: int
    r_act: dict[str, Spread]
    r_weights: dict[str, Spread]
    order_act: float | None
    order_weights: float | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def stability(tables: Sequence[Table], what: str) -> Stability:
    """Means and spreads over two or more tables; ceilings take no part in the order."""
    return Stability(
        what=what,
        num_tables=len(tables),
        r_act=_spreads(tables, lambda row: row.r_act),
        r_weights=_spreads(tables, lambda row: row.r_weights),
        order_act=_order(tables, lambda row: row.r_act),
        order_weights=_order(tables, lambda row: row.r_weights),
    )


def _spreads(tables: Sequence[Table], score: Callable[[Row], float | None]) -> dict[str, Spread]:
    found: dict[str, Spread] = {}
    for rows in zip(*(table.rows for table in tables), strict=True):
        values = [value for row in rows if (value := score(row)) is not None]
        whole = len(values) == len(tables) > 1
        found[rows[0].name] = Spread(fmean(values), stdev(values)) if whole else Spread(None, None)
    return found


def _order(tables: Sequence[Table], score: Callable[[Row], float | None]) -> float | None:
    columns = [[score(row) for row in table.rows if row.axis_kind != "ceiling"] for table in tables]
    known = [place for place, values in enumerate(zip(*columns, strict=True)) if None not in values]
    chosen = [[column[place] for place in known] for column in columns]
    if len(known) < 3 or len(tables) < 2 or any(len(set(column)) == 1 for column in chosen):
        return None
    return fmean(_correlation(first, second) for first, second in combinations(chosen, 2))


def _correlation(first: Sequence[float | None], second: Sequence[float | None]) -> float:
    """Spearman's: of the ranks, ties sharing theirs."""
    return float(np.corrcoef(rankdata(first), rankdata(second))[0, 1])
