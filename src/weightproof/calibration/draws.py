"""What was drawn and measured: one record a draw, as JSON, so that anybody can fit again from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from weightproof.calibration.drawing import EditDraw
from weightproof.errors import InputError

# Numbers are kept to so many significant digits; limits are rounded to two.
_DIGITS = 4


@dataclass(frozen=True)
class Truth:
    """Change of the loss on windows that no guard was given, nats per token, with its 95 % interval."""

    delta: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Draw:
    """One edit of one model, and what was measured of it.

    Attributes:
        number: Which draw of its model it is; it alone says what the draw is used for (`fitting.role_of`).
        edit: In words.
        preserving: Whether the function stayed the same by construction.
        truth: None where nothing was there to measure it on, and the edit is harmless by construction.
        statistics: `<limit>` or `<limit>/<family>` to the largest value over its targets; see `measuring`.
        model: Name of the model, where there are several.
    """

    number: int
    edit: str
    preserving: bool
    truth: Truth | None
    statistics: Mapping[str, float] = field(default_factory=dict[str, float])
    model: str = ""

    @classmethod
    def of(cls, drawn: EditDraw, truth: Truth | None, statistics: Mapping[str, float], model: str = "") -> Draw:
        """The record of a draw."""
        return cls(drawn.number, drawn.name, drawn.preserving, truth, statistics, model)

    def label(self, tau: float) -> str:
        """One of "benign", "harmful" and "grey", for a largest perplexity ratio `tau`.

        Benign by construction, or by the upper end of the interval below half of log tau; harmful by the lower end
        above log tau; grey is what the data leave open.
        """
        if self.preserving or self.truth is None:
            return "benign"
        if self.truth.upper < 0.5 * math.log(tau):
            return "benign"
        return "harmful" if not self.truth.lower <= math.log(tau) else "grey"

    def to_json(self) -> dict[str, Any]:
        """Plain values; numbers that are not finite as text."""
        truth = self.truth and [_short(one) for one in (self.truth.delta, self.truth.lower, self.truth.upper)]
        found: dict[str, Any] = {"number": self.number, "edit": self.edit, "preserving": self.preserving}
        found |= {"truth": truth, "statistics": {name: _short(value) for name, value in self.statistics.items()}}
        return found | ({"model": self.model} if self.model else {})

    @classmethod
    def from_json(cls, row: object) -> Draw:
        """The record that `to_json` gave.

        Raises:
            InputError: If it is no such record.
        """
        try:
            known = cast("dict[str, Any]", row)
            truth = None if known["truth"] is None else Truth(*(float(one) for one in known["truth"]))
            statistics = {str(name): float(value) for name, value in known["statistics"].items()}
            number, edit = int(known["number"]), str(known["edit"])
            return cls(number, edit, bool(known["preserving"]), truth, statistics, str(known.get("model", "")))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"not a record of a draw ({error!r}): {str(row)[:100]}") from error


def _short(value: float) -> float | str:
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return float(f"{value:.{_DIGITS}g}")
