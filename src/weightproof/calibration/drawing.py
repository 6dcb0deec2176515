"""The distribution of edits that a calibration draws from, and one draw of it.

A draw is a kind, a strength, and which part of the model it changes; everything of it follows from a seed and its
number. Edits of values are graded from harmless to harmful. Edits that preserve the function are drawn one time in six
where the model admits them (`preserving`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

VERSION = 1
VALUE, PRESERVING = "value", "preserving"
# Kinds of value edits and how often each is drawn.
WEIGHTS: Mapping[str, int] = {"cast": 1, "rtn": 4, "noise": 3, "prune": 3, "svd": 2, "scale": 2}
PRESERVING_SHARE = 1 / 6
WORDS = (
    "kind and strength at random: cast (bf16, fp16), round to nearest (8 to 2 bits; per channel, tensor or group of "
    "32), white noise (60 to 10 dB below a matrix's standard deviation), magnitude pruning (1 to 60 %), truncated SVD "
    "(1e-4 to .5 of the energy off), a factor (1.01 to 1.2 or its inverse); on all matrices, one block or one family; "
    "one in six preserves the function instead (neurons permuted, scales moved from one factor to the other)"
)
SAFE_WORDS = (
    "edits that are harmless by construction: casts, int8 per channel, white noise 60 to 80 dB below a matrix's "
    "standard deviation, and edits that preserve the function"
)


@dataclass(frozen=True)
class EditDraw:
    """One drawn edit.

    Attributes:
        number: Which draw it is, from 0.
        seed: Of its own random numbers.
        kind: One of `WEIGHTS`, or of the preserving edits of the model.
        params: Its strength, ready for JSON.
        where: "all", "block <name>" or "family <name>".
        preserving: Whether the function stays the same by construction.
    """

    number: int
    seed: int
    kind: str
    params: Mapping[str, Any] = field(default_factory=dict[str, Any])
    where: str = "all"
    preserving: bool = False

    @property
    def name(self) -> str:
        """In words, such as `rtn bits=4 granularity=channel, block 2`."""
        strength = "".join(f" {key}={value}" for key, value in self.params.items())
        return f"{self.kind}{strength}, {self.where}"


@dataclass(frozen=True)
class Choices:
    """What there is to draw from in one model.

    Attributes:
        blocks: Names of its blocks.
        families: Families of its matrices that edits range over.
        preserving: Preserving edits that it admits.
        safe: Draw only what is harmless by construction: nothing can tell the truth about the rest.
    """

    blocks: Sequence[str]
    families: Sequence[str]
    preserving: Sequence[str]
    safe: bool = False


def draw(seed: int, number: int, choices: Choices) -> EditDraw:
    """The draw of this number; independent of all others."""
    random = np.random.default_rng([VERSION, seed, number])
    own = int(random.integers(2**31))
    where = _place(random, choices)
    if choices.preserving and random.random() < (0.5 if choices.safe else PRESERVING_SHARE):
        kind = str(random.choice(list(choices.preserving)))
        factor = _rounded(math.exp(random.uniform(math.log(2.0), math.log(10.0))))
        place = where if where.startswith("block") else "all"
        return EditDraw(number, own, kind, {"factor": factor}, place, preserving=True)
    if choices.safe:
        return EditDraw(number, own, *_safe_edit(random), where)
    kinds = list(WEIGHTS)
    kind = str(random.choice(kinds, p=np.array([WEIGHTS[one] for one in kinds]) / sum(WEIGHTS.values())))
    return EditDraw(number, own, kind, _strength(kind, random), where)


def _place(random: np.random.Generator, choices: Choices) -> str:
    places: list[tuple[str, Sequence[str]]] = [("all", ("",))]
    places += [("block", choices.blocks)] if len(choices.blocks) > 1 else []
    places += [("family", choices.families)] if len(choices.families) > 1 else []
    label, names = places[int(random.integers(len(places)))]
    return f"{label} {names[int(random.integers(len(names)))]}".strip()


def _strength(kind: str, random: np.random.Generator) -> dict[str, Any]:
    match kind:
        case "cast":
            return {"dtype": str(random.choice(["bfloat16", "float16"]))}
        case "rtn":
            granularity = str(random.choice(["channel", "tensor", "group"]))
            return {"bits": int(random.integers(2, 9)), "granularity": granularity}
        case "noise":
            return {"decibels": _rounded(random.uniform(10.0, 60.0))}
        case "prune":
            return {"sparsity": _rounded(math.exp(random.uniform(math.log(0.01), math.log(0.6))))}
        case "svd":
            off = math.exp(random.uniform(math.log(1e-4), math.log(0.5)))
            return {"energy": _rounded(1.0 - off, 5)}
        case _:
            factor = random.uniform(1.01, 1.2)
            return {"factor": _rounded(factor if random.random() < 0.5 else 1.0 / factor, 4)}


def _safe_edit(random: np.random.Generator) -> tuple[str, dict[str, Any]]:
    kind = str(random.choice(["cast", "rtn", "noise"]))
    if kind == "rtn":
        return kind, {"bits": 8, "granularity": "channel"}
    if kind == "noise":
        return kind, {"decibels": _rounded(random.uniform(60.0, 80.0))}
    return kind, _strength(kind, random)


def _rounded(value: float, digits: int = 3) -> float:
    return round(float(value), digits)
