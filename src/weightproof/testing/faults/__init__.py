"""Faults of training, to be injected on purpose: what a guard must find, and what it must let pass.

Every fault is a frozen dataclass: which step of the optimizer it hits (`at`, counted from 1), for how many
steps, on which rank (None: all), from which seed, and how hard. The defaults are harmful strengths; `mild()` gives
the same fault at a strength that training shrugs off. `REGISTRY` holds all of them by name, and `inject`
(injection.py) hangs them into a loop.

    >>> sorted(REGISTRY)[:3]
    ['bad-batch', 'desynchronised', 'gradient-bit-flip']
    >>> WeightBitFlip(at=30).mild().bit
    6
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from weightproof.errors import InputError
from weightproof.testing.faults.bits import GradientBitFlip, OptimizerBitFlip, WeightBitFlip
from weightproof.testing.faults.fault import Fault
from weightproof.testing.faults.steps import BadBatch, LearningRateSpike, Overflow
from weightproof.testing.faults.surroundings import LoaderSkew, StuckRank, WrongRNG
from weightproof.testing.faults.weights import Desynchronised, NormGainFlip, RankNaN, StaleMasters

__all__ = [
    "REGISTRY",
    "BadBatch",
    "Desynchronised",
    "Fault",
    "GradientBitFlip",
    "LearningRateSpike",
    "LoaderSkew",
    "NormGainFlip",
    "OptimizerBitFlip",
    "Overflow",
    "RankNaN",
    "StaleMasters",
    "StuckRank",
    "WeightBitFlip",
    "WrongRNG",
    "make_fault",
]

REGISTRY: Mapping[str, type[Fault]] = {
    kind.name: kind
    for kind in (
        GradientBitFlip,
        OptimizerBitFlip,
        WeightBitFlip,
        LearningRateSpike,
        BadBatch,
        RankNaN,
        StuckRank,
        Desynchronised,
        StaleMasters,
        WrongRNG,
        LoaderSkew,
        Overflow,
        NormGainFlip,
    )
}


def make_fault(name: str, **parameters: Any) -> Fault:
    """A fault by its registered name.

    Raises:
        InputError: There is no such fault, or it has no such parameter.
    """
    if name not in REGISTRY:
        raise InputError(f"there is no fault {name!r}: choose from {', '.join(sorted(REGISTRY))}")
    make: Callable[..., Fault] = REGISTRY[name]
    known = {one.name for one in fields(REGISTRY[name])}
    if unknown := sorted(parameters.keys() - known):
        raise InputError(f"the fault {name!r} has no parameter {unknown[0]!r}: it has {', '.join(sorted(known))}")
    return make(**parameters)
