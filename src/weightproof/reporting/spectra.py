"""Spectral numbers of the most changed matrices, before and after, from the readings of a certificate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MOST = 8
"""Matrices shown."""


@dataclass(frozen=True)
class SpectralChange:
    """One matrix: its numbers before and after; None where one was not measured.

    Attributes:
        name: Public name.
        delta: ||W' - W|| / ||W||.
        spectral_norm: Largest singular value, before and after.
        stable_rank: (||W||_F / s1)^2.
        sigma: Noise scale of the Marchenko-Pastur fit.
        spikes: Singular values above the noise: a number, or the two ends that bounds leave open.
    """

    name: str
    delta: Any
    spectral_norm: tuple[Any, Any]
    stable_rank: tuple[Any, Any]
    sigma: tuple[Any, Any]
    spikes: tuple[Any, Any]

    @property
    def ratio(self) -> float | None:
        """Largest singular value after, in units of that before."""
        old, new = self.spectral_norm
        if not isinstance(old, int | float) or not isinstance(new, int | float) or not old:
            return None
        return new / old if math.isfinite(new / old) else None


def spectral_changes(
    deltas: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]
) -> tuple[SpectralChange, ...]:
    """The most changed matrices, most changed first.

    Args:
        deltas: Matrix name to relative change.
        before: Readings before, as the certificate carries them; empty where it does not.
        after: Readings after.
    """
    known = [
        name for name in deltas if name in (before.get("matrices") or {}) and name in (after.get("matrices") or {})
    ]
    worst = sorted(known, key=lambda name: -_size(deltas[name]))[:MOST]
    return tuple(_change(name, deltas[name], before, after) for name in worst)


def _size(delta: Any) -> float:
    return float(delta) if isinstance(delta, int | float) and math.isfinite(delta) else math.inf


def _change(name: str, delta: Any, before: Mapping[str, Any], after: Mapping[str, Any]) -> SpectralChange:
    matrices = before["matrices"][name], after["matrices"][name]
    bulks = (before.get("bulks") or {}).get(name) or {}, (after.get("bulks") or {}).get(name) or {}
    return SpectralChange(
        name,
        delta,
        _both(matrices, lambda item: item.get("spectral_norm")),
        _both(matrices, _stable_rank),
        _both(bulks, lambda item: item.get("sigma_mp")),
        _both(bulks, _spikes),
    )


def _both(sides: tuple[Any, Any], read: Any) -> tuple[Any, Any]:
    return read(sides[0]), read(sides[1])


def _stable_rank(item: Mapping[str, Any]) -> float | None:
    frobenius, top = item.get("frobenius_norm"), item.get("spectral_norm")
    if not isinstance(frobenius, int | float) or not isinstance(top, int | float) or not top:
        return None
    return (frobenius / top) ** 2


def _spikes(item: Mapping[str, Any]) -> Any:
    if item.get("num_spikes") is not None:
        return item["num_spikes"]
    low, high = item.get("num_spikes_low"), item.get("num_spikes_high")
    return None if low is None or high is None else f"{low}\u2013{high}"
